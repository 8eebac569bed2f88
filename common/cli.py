"""Parse the options that commands share, and print tables."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from common.device import PRECISIONS
from common.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line, as every command does."""

    def __init__(self, description: str | None = None, **settings):
        first_line = (description or "").partition("\n")[0]  # None: `python -OO`
        super().__init__(description=first_line, allow_abbrev=False, **settings)
        self.register("type", Path, _path)

    def _parse_optional(self, arg_string: str):
        # All options here begin with "--", so a value may begin with "-".
        is_option = arg_string.startswith("--") or arg_string == "-h"
        return super()._parse_optional(arg_string) if is_option else None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _path(text: str) -> Path:
    if not text:  # a script's unset variable; Path("") would be the current directory
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def typed_options(argv: list[str] | None = None) -> set[str]:
    """Return the options that the command line names, such as {"--lr"}."""
    words = sys.argv[1:] if argv is None else argv
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def number(kind: type, low: float, high: float = 1e9, below: bool = False) -> Callable:
    """Return an option's type: an int or float from `low` to `high`, or to just below `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (below and value == high):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{text!r:.40} is not {what} from {low:g} to {'below ' if below else ''}{high:g}"
            )
        return value

    return parse


def steps_or_seconds(text: str) -> int | float:
    """Parse a number of steps (int), or seconds (float) from `90s` or `10m`."""
    if match := re.fullmatch(r"([1-9]\d{0,6})([sm])", text):
        return float(match[1]) * {"s": 1, "m": 60}[match[2]]
    try:
        return number(int, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor a time such as 90s or 10m") from error


BASE = {
    "default": "auto",
    "metavar": "B",
    "help": "directory, gpt2[-medium|-large|-xl], distilgpt2, mini, OWNER/NAME[@REVISION] on the "
    "Hugging Face hub, or auto: gpt2 where it can be had, else mini",
}
DEVICE = {
    "default": "auto",
    "choices": ("auto", "cpu", "cuda", "mps"),
    "help": "auto: CUDA, else MPS, else the CPU",
}
PRECISION = {
    "default": "auto",
    "choices": ("auto", *PRECISIONS),
    "help": "of the matmuls; auto: by the device (README, Speed)",
}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", **DEVICE)
    parser.add_argument("--precision", **PRECISION)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Print and return a Markdown table: first column aligned left, the others right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = []
    for first, *others in (columns, ["-" * width for width in widths], *rows):
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    print(text)
    return text
