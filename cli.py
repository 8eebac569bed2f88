"""What the commands have in common: their options, and the tables they print."""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from errors import UserError
from hardware import PRECISIONS
from lora.adapter import adapter_base, load_adapter
from model.checkpoint import load_gpt2
from model.gpt2 import GPT2
from model.hub import find_base

ROOT = Path(__file__).resolve().parent
BOOK = ROOT / "data" / "book.txt"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as all of a user's mistakes are."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def number(kind: type, low: float, high: float = 1e9, below: bool = False) -> Callable:
    """An option's type: an int or float from `low` to `high`, or to just below it."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (below and value == high):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not {what} from {low:g} to "
                                             f"{'below ' if below else ''}{high:g}")
        return value

    return parse


def steps_or_seconds(text: str) -> int | float:
    """An option's type: a number of steps (int), or seconds (float) from `90s` or `10m`."""
    if match := re.fullmatch(r"([1-9]\d{0,6})([sm])", text):
        return float(match[1]) * {"s": 1, "m": 60}[match[2]]
    try:
        return number(int, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor a time such as 90s or 10m") from error


def add_base_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="auto", metavar="B",
                        help="directory, gpt2[-medium|-large|-xl], mini, or auto: gpt2 where it "
                             "can be had, else mini (default: %(default)s)")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--base` and `--adapter`, which `load_model` reads."""
    add_base_options(parser)
    parser.add_argument("--adapter", type=Path, metavar="DIR",
                        help="an adapter in PEFT's format; with --base auto, its base is loaded")


def load_model(args: argparse.Namespace) -> tuple[str, GPT2]:
    """The base's name and the model, with its adapter if one was asked for, in evaluation mode."""
    base = args.base
    if args.adapter and base == "auto":
        base = adapter_base(args.adapter) or base
    name, directory = find_base(base)
    model = load_gpt2(directory)
    if args.adapter:
        load_adapter(model, args.adapter)
    return name, model


def parse_train_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """`train.py`'s options. Defaults are the reference run's; the two methods' differ in few."""
    parser = Parser(prog="train.py", description=description.splitlines()[0])
    methods = parser.add_subparsers(dest="method", required=True)
    for method, batch_size, lr in (("lora", 16, 3e-4), ("full", 64, 3e-5)):
        sub = methods.add_parser(method, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_base_options(sub)
        _add_data_options(sub)
        _add_training_options(sub, batch_size, lr)
        _add_run_options(sub, ROOT / "runs" / method)
        if method == "lora":
            _add_lora_options(sub)
    return parser.parse_args(argv)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--book", type=Path, default=BOOK, help="UTF-8 text file")
    parser.add_argument("--block-size", type=number(int, 1), default=128, help="tokens a window")
    parser.add_argument("--stride", type=number(int, 1), default=16,
                        help="a training window starts every so many tokens")
    parser.add_argument("--val-fraction", type=number(float, 0.001, 0.9), default=0.1)
    parser.add_argument("--label-shift", type=number(int, 1, 2), default=1, metavar="{1,2}",
                        help="1: next token; 2: the reference run's measure")


def _add_training_options(parser: argparse.ArgumentParser, batch_size: int, lr: float) -> None:
    parser.add_argument("--epochs", type=number(int, 1), default=3)
    parser.add_argument("--max-steps", type=number(int, 1), default=None,
                        help="end here if the epochs do not end sooner; the schedule ends here too")
    parser.add_argument("--batch-size", type=number(int, 1), default=batch_size,
                        help="windows a step")
    parser.add_argument("--grad-accum", type=number(int, 1), default=1,
                        help="parts a step's batch is computed in: saves memory, same result")
    parser.add_argument("--lr", type=number(float, 1e-12, 10.0), default=lr)
    parser.add_argument("--weight-decay", type=number(float, 0.0, 10.0), default=0.01)
    parser.add_argument("--warmup-ratio", type=number(float, 0.0, 1.0, below=True), default=0.06)
    parser.add_argument("--clip", type=number(float, 0.0), default=1.0,
                        help="largest gradient norm; 0 does not clip")
    parser.add_argument("--base-dropout", type=number(float, 0.0, 1.0, below=True), default=None,
                        help="all of the base's dropouts; default: its config's")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--gradient-checkpointing", action="store_true",
                        help="compute activations twice instead of keeping them: saves memory")
    add_device_options(parser)


def _add_run_options(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--eval-every", type=number(int, 1), default=None,
                        help="validate every so many steps, besides after each epoch")
    parser.add_argument("--log-every", type=number(int, 1), default=10)
    parser.add_argument("--checkpoint-every", type=steps_or_seconds, default="10m", metavar="N",
                        help="save every N steps, or every Ns seconds or Nm minutes, besides after "
                             "each epoch")
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--resume", action="store_true", help="go on with the run in --out")
    state.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _add_lora_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--r", type=number(int, 1), default=8, help="rank")
    parser.add_argument("--lora-alpha", type=number(int, 1, 1e6), default=16)
    parser.add_argument("--lora-dropout", type=number(float, 0.0, 1.0, below=True), default=0.05)
    parser.add_argument("--target-modules", nargs="+", default=["c_attn"], metavar="NAME")
    parser.add_argument("--init-adapter", type=Path, default=None, metavar="DIR",
                        help="start from this adapter; it brings its own rank, alpha, dropout and "
                             "targets")


def resume_command(launcher: Sequence[str] = ()) -> str:
    """What to type to go on with the run that this command began; `launcher`: `Ranks.launcher`."""
    again = [arg for arg in sys.argv if arg not in ("--overwrite", "--resume")]
    python = os.path.relpath(sys.executable)
    return shlex.join([sys.executable if python.startswith("..") else python, *launcher, *again,
                       "--resume"])


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, ["-" * width for width in widths], *rows):
        padded = [text.ljust(width) if i == 0 else text.rjust(width)
                  for i, (text, width) in enumerate(zip(row, widths, strict=True))]
        print("| " + " | ".join(padded) + " |")
