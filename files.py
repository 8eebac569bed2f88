"""Reading and writing files so that none is ever half-written or believed without a look."""

import glob
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError
from interrupts import unfinished
from untrusted import check_regular

MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 16
UNFINISHED = ".tmp"


@contextmanager
def atomic_path(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """A temporary path; what is written there replaces `path` whole, or not at all.

    The data reaches the disk (fsync) before a rename makes it visible; what `path` held until
    then is kept as `backup`. Raises UserError when the place cannot be written.
    """
    path = Path(path)
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder, because some writers (safetensors) put a temporary of their own beside a file.
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent))
    unfinished.add(folder)
    try:
        with _refusing(path):
            yield folder / path.name
            _sync(folder / path.name)
            (folder / path.name).chmod(0o666 & ~_umask())  # a writer's 0600 would hide a result
            if backup and os.path.lexists(path):
                os.replace(path, backup)
            os.replace(folder / path.name, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.discard(folder)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn a refusal of the system into a UserError that names `path`.

    Native writers hide the OSError: torch in a RuntimeError's context, safetensors in its text.
    """
    try:
        yield
    except Exception as error:
        cause = error
        if isinstance(error, RuntimeError):
            cause = error.__context__
        elif hidden := re.search(r"\(os error (\d+)\)", str(error)):
            cause = OSError(int(hidden[1]), os.strerror(int(hidden[1])))
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause})") from error


def remove_stale(directory: Path, names: Iterable[str]) -> None:
    """Remove what a killed process left of an `atomic_path` of these names."""
    for name in names:
        for folder in directory.glob(f".{glob.escape(name)}.*{UNFINISHED}"):
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """The JSON object in a small file.

    Raises UserError when it is missing or anything else, and for what two readers may take for
    two things or cannot hold: a name twice, a number that no 64 bits hold, deep nesting.
    """
    path = Path(path)
    if check_regular(path) > MAX_JSON_BYTES:
        raise UserError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes; not a config file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object,
                           parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where an object is needed")
    if _depth(value) > MAX_JSON_DEPTH:
        raise UserError(f"{path}: nested deeper than {MAX_JSON_DEPTH}; not a config file")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name twice in one object")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= 1 << 63:
        raise ValueError("a whole number of more than 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level := [inner for outer in level if isinstance(outer, dict | list)
                    for inner in (outer.values() if isinstance(outer, dict) else outer)]:
        depth += 1
    return depth


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
