"""Write files whole or not at all; read small ones with errors that name them."""

import hashlib
import json
import os
import reprlib
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from common.signals import unfinished

UNFINISHED = ".tmp"


class NotWritable(UserError):
    """A path that cannot be written."""


@contextmanager
def atomic_path(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """Give a temporary path. What is written there replaces `path` whole, or not at all.

    The data reaches the disk (fsync) before a rename makes it visible. What `path` held before is
    kept as `backup`. Raises NotWritable if the place cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.urandom(4).hex()}{UNFINISHED}"
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # root would replace /dev/null
            raise OSError("not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.add(temporary)
        try:
            yield temporary
            _sync(temporary)
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
    """Remove the temporary files of these names that a killed process left behind."""
    for name in names:
        for path in directory.glob(f".{name}.*{UNFINISHED}"):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file cannot be read or holds something else."""
    with open_file(path) as file:
        text = file.read()
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where an object is needed")
    return value


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_file(path: Path) -> BinaryIO:
    """Open a file to read bytes. Raises UserError, also for a pipe or device, which may not end."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb")
        reason = "not a regular file"
    except OSError as error:
        reason = error.strerror
    raise UserError(f"{path}: cannot be read ({reason})")


def check_number(
    path: Path, field: str, value: object, kind: type | tuple[type, ...], low: float, high: float
):
    """Return a number from a file. Raises UserError unless it is from `low` to `high`."""
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{path}: {field} {brief(value)} is not {what} from {low} to {high:,.0f}")
    return value


def refuse_existing(out: Path) -> None:
    """Raise UserError unless `out` is a new or empty directory, so that nothing is overwritten."""
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise UserError(f"--out {out}: exists already; name a new directory")


def is_utf8(text: str) -> bool:
    """Return whether a command-line text was UTF-8: Python puts surrogates for other bytes."""
    return text == text.encode(errors="replace").decode()


def brief(value: object) -> str:
    """Return a value from a file for a message: one printable line of bounded length."""
    return reprlib.repr(value)[:120]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
