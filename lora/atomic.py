"""Replace files as a whole, so that a crash leaves the old file or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`. On success, rename the file to `path`. If
    `backup` is given, the old file is renamed to `backup`.

    The data reach the disk before the rename makes them visible, and the rename before the return.
    Raises OSError, naming `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        sync(temporary)
        if backup and os.path.lexists(path):
            os.replace(path, backup)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Write a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
