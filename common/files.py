"""Write files atomically, and read small files with errors that name the file."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from common.signals import unfinished
from lora.atomic import replacing, sync
from lora.peft_config import brief as brief  # for the folders above

UNFINISHED = ".tmp"
READ_SIZE = 1 << 20  # bytes read at a time


class NotWritable(UserError):
    """A path that cannot be written."""


@contextmanager
def atomic_path(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path, as `lora.atomic.replacing` does. A signal removes the temporary file.

    Raises NotWritable if `path` cannot be written.
    """
    path = Path(path)
    temporary = path
    try:
        # Otherwise root could replace a device such as /dev/null.
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, backup) as temporary:
            unfinished.add(temporary)
            yield temporary
    except OSError as error:
        raise NotWritable(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        unfinished.discard(temporary)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory. On success, rename the directory to `out`."""
    out = Path(os.path.realpath(out))
    temporary = out.parent / f".{out.name}.{os.urandom(4).hex()}{UNFINISHED}"
    unfinished.add(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
        sync(out.parent)
    except OSError as error:
        raise NotWritable(f"--out {out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        unfinished.discard(temporary)


def remove_stale(directory: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that a killed process left behind for these names."""
    for name in names:
        for path in directory.glob(f".{name}.*{UNFINISHED}"):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file cannot be read or is not a JSON object."""
    with open_file(path) as file:
        text = file.read()
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: contains a JSON {type(value).__name__}, not an object")
    return value


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex. Raises UserError if the file cannot be read."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        for block in iter(lambda: file.read(READ_SIZE), b""):
            digest.update(block)
    return digest.hexdigest()


def open_file(path: Path) -> BinaryIO:
    """Open a file to read bytes. Raises UserError if the file cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def display_path(path: Path) -> str:
    """Return a path for publication. An absolute path would leak machine and user names."""
    relative = os.path.relpath(path)
    if relative.startswith(os.pardir):
        return os.path.basename(os.path.abspath(path))
    return relative


def refuse_existing(out: Path) -> None:
    """Raise UserError unless `new_directory` can create `out`, which must be new or empty."""
    if not os.path.lexists(out):
        return
    if os.path.isdir(out) and not os.listdir(out):
        return
    raise UserError(f"--out {out}: exists already; name a new directory")
