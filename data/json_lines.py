"""Read JSON lines, one example per line. Errors give the number of the line."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError
from common.files import brief, open_file

LONGEST_LINE = 1 << 16  # bytes, enough to fill any context
T = TypeVar("T")


def read_lines(path: Path, read: Callable[[dict], T]) -> list[T]:
    """Apply `read` to each line's JSON. For a bad line, raises UserError with the line's number."""
    found = []
    with open_file(path) as file:
        lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found.append(read(_parse(line)))
            except (ValueError, UserError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
    return found


def _parse(line: bytes) -> dict:
    if line.lstrip().startswith(b"["):
        raise ValueError("is a JSON array; write each example as a line of its own")
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_without_doubles)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"is not JSON in UTF-8 of at most {LONGEST_LINE:,} bytes ({error})"
        ) from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict:
    """Make a JSON object. Raises ValueError for a key that occurs twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"has the key {brief(key)} twice")
    return dict(pairs)


def refuse_unknown(fields: dict, known: Collection[str], forms: str) -> None:
    """Raise ValueError for a key that is not in `known`. The message quotes `forms`, which
    describes a valid example."""
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ValueError(f"has the unknown key {brief(unknown[0])}; an example has {forms}")
