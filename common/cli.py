"""Parse the options that commands share, and print tables."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError

GONE = {  # options and commands of 1.0, and what replaces them
    "--choices": "use lm-evaluation-harness on a merged model (docs/howto.md)",
    "--loraplus-lr-ratio": "use --lr, one rate for A and B (docs/experiments.md#the-variants)",
    "python -m adapters.inspect": "use a few lines of numpy (docs/lora-in-depth.md)",
    "python -m benchmarks.estimate": "use train.py --max-steps 20, which shows tokens per second",
    "python -m benchmarks.operations": "use the measured rows in docs/speed.md",
    "python -m training.sweep": "use a shell loop and evaluate.py --compare (docs/howto.md)",
}


def refuse_gone(word: str) -> None:
    """Raise UserError for an option or a command that is in `GONE`."""
    if word in GONE:
        raise UserError(f"{word} is gone in 2.0: {GONE[word]}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake as a UserError with a message of one line."""

    def __init__(self, description: str | None = None, **settings: Any):
        first_line = (description or "").partition("\n")[0]  # no docstring under `python -OO`
        super().__init__(description=first_line, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            for word in message.split():
                refuse_gone(word.partition("=")[0])
        if "expected" in message:  # argparse took the value for an option
            message += "; give a value that begins with - as --option=-value"
        raise UserError(f"{message} (see {self.prog} --help)")


def number(
    kind: type[int] | type[float], low: float, high: float = 10**9, below: bool = False
) -> Callable[[str], Any]:
    """Return an argparse type that accepts an int or float from `low` to `high`. With `below`,
    `high` itself is refused."""
    what = "a whole number" if kind is int else "a number"
    limit = f"below {high:,}" if below else f"{high:,}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        too_high = value >= high if below else value > high
        if value < low or too_high or math.isnan(value):
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not {what} from {low:g} to {limit}")
        return value

    return parse


@dataclass(frozen=True)
class Interval:
    """A number of steps or of seconds. `text` is the text that the user typed."""

    text: str
    number: int
    is_time: bool

    def __str__(self) -> str:
        return self.text

    def is_due(self, step: int, seconds: float) -> bool:
        """Return whether an action is due after `step`, if the last action was `seconds` ago."""
        if self.is_time:
            return seconds >= self.number
        return step % self.number == 0


def steps_or_seconds(text: str) -> Interval:
    """Parse a number of steps, such as 50, or a time, such as 90s or 10m."""
    time = re.fullmatch(r"([1-9]\d{0,6})([sm])", text)
    if time:
        return Interval(text, int(time[1]) * {"s": 1, "m": 60}[time[2]], True)
    try:
        return Interval(text, number(int, 1)(text), False)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor a time such as 90s or 10m") from error


BASE_OPTION: dict[str, Any] = {
    "default": "auto",
    "metavar": "B",
    "help": "directory, gpt2[-medium|-large|-xl], distilgpt2, mini, OWNER/NAME[@REVISION] on the "
    "Hugging Face hub, or auto: gpt2 if it is available, otherwise mini",
}
DEVICE_OPTION: dict[str, Any] = {
    "default": "auto",
    "choices": ("auto", "cpu", "cuda", "mps"),
    "help": "auto: CUDA, otherwise MPS, otherwise the CPU",
}
PRECISION_OPTION: dict[str, Any] = {
    "default": "auto",
    "choices": ("auto", "fp32", "bf16", "fp16"),
    "help": "precision of matmuls. auto: depends on the device (docs/howto.md)",
}
KERNELS_OPTION: dict[str, Any] = {
    "default": "fast",
    "choices": ("fast", "plain"),
    "help": "fast: the operations of model/kernels. plain: the PyTorch operations of model/gpt2.py "
    "(default: fast)",
}
NONE = "none"  # do not quantise the base, even if an adapter records a quantisation
QUANTISE_OPTION: dict[str, Any] = {
    "choices": ("nf4", "int8", NONE),
    "help": "store the blocks' linear layers in 4 bits (nf4: QLoRA) or 8 bits (int8) per weight. "
    "none: do not quantise (default: as in the training of the adapter)",
}


def add_model_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("--base", **BASE_OPTION)
    parser.add_argument(
        "--adapter",
        type=Path,
        nargs=nargs,
        metavar="DIR",
        help="an adapter in PEFT's format, or OWNER/NAME on the hub. With --base auto, the adapter "
        "names the base",
    )
    parser.add_argument("--quantise", "--quantize", **QUANTISE_OPTION)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", **DEVICE_OPTION)
    parser.add_argument("--precision", **PRECISION_OPTION)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Print and return a Markdown table. The first column is aligned left, other columns right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for first, *others in (columns, rule, *rows):
        cells = [first.ljust(widths[0])]
        for text, width in zip(others, widths[1:], strict=True):
            cells.append(text.rjust(width))
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    return table
