"""Read `run.json`, the report of a finished run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import brief, read_json

RUN = "run.json"  # training writes this file last, so it marks a finished run


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e305  # not NaN, and matplotlib can draw it


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 63


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_book(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(path, str) for path in value)


NUMBERS = (
    "base_val_loss",
    "best_val_bits_per_byte",
    "best_val_loss",
    "best_val_perplexity",
    "lr",
    "peak_memory_mb",
    "seconds",
    "steps",
    "tokens_per_second",
    "trainable_parameters",
)
# The fields of run.json that commands read, and the options there, each with a test of its value.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "options": lambda value: isinstance(value, dict),
    "method": lambda value: value in ("lora", "full"),
    "base": lambda value: isinstance(value, str),
    "base_sha256": lambda value: isinstance(value, dict),
    "book_sha256": lambda value: isinstance(value, list),
    **dict.fromkeys(NUMBERS, _is_number),
}
OPTIONS: dict[str, Callable[[Any], bool]] = {
    "batch_size": _is_count,
    "book": _is_book,
    "data": _is_text_or_none,
    "val_data": _is_text_or_none,
    "val_fraction": lambda value: _is_number(value) and value <= 1,
    "block_size": _is_count,
    "label_shift": _is_count,
}


def read_run(directory: Path) -> dict[str, Any]:
    """Read a finished run's `run.json`. Raises UserError if the file is missing or damaged, or if
    it lacks one of `FIELDS` or `OPTIONS`."""
    if directory.is_dir() and not (directory / RUN).exists():
        raise UserError(f"{directory}: contains no finished run ({RUN}); --resume continues a run")
    run = read_json(directory / RUN)
    _check(directory / RUN, run, FIELDS)
    _check(directory / RUN, run["options"], OPTIONS)
    return run


def _check(path: Path, stored: Mapping[str, Any], fields: Mapping[str, Callable]) -> None:
    for name, is_possible in fields.items():
        problem = "" if name in stored else f"has no {name}"
        if not problem and not is_possible(stored[name]):
            problem = f"damaged ({name} is {brief(stored[name])})"
        if problem:
            raise UserError(f"{path}: {problem}; train again with --overwrite")
