"""Write files whole or not at all; read small ones with errors that name them."""

import glob
import hashlib
import json
import os
import reprlib
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.signals import unfinished

UNFINISHED = ".tmp"
MAX_JSON_BYTES = 1 << 25  # a large tokenizer.json has half of that


class NotWritable(UserError):
    """The system does not let us write there."""


@contextmanager
def atomic_path(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """Give a temporary file; what is written there replaces `path` whole, or not at all.

    The data reaches the disk (fsync) before a rename makes it visible. What `path` held before is
    kept as `backup`. Raises NotWritable if the place cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(UNFINISHED, f".{path.name}.", path.parent)
        os.close(handle)
        temporary = Path(name)
        unfinished.add(temporary)
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide a result from others
            if backup and os.path.lexists(path):
                os.replace(path, backup)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            unfinished.discard(temporary)
    except OSError as error:
        raise NotWritable(f"{path}: cannot be written ({error.strerror or error})") from error


def remove_stale(directory: Path, names: Iterable[str]) -> None:
    """Remove what a killed process left of an `atomic_path` of these names."""
    for name in names:
        for path in directory.glob(f".{glob.escape(name)}.*{UNFINISHED}"):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file cannot be read or holds something else."""
    check_regular(path)
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise UserError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes; not a file of settings")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where an object is needed")
    return value


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex. Raises UserError if it cannot be read."""
    check_regular(path)
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def check_regular(path: Path) -> None:
    """Raise UserError for a missing file, a directory, a pipe or a device: it may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: cannot be read (not a regular file)")


def refuse_existing(out: Path) -> None:
    """Raise UserError unless `out` is a new or empty directory, so that nothing is overwritten."""
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise UserError(f"--out {out}: exists already; name a new directory")


def brief(value: object) -> str:
    """Return a value from a file for a message: one printable line of bounded length."""
    return reprlib.repr(value)[:120]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
