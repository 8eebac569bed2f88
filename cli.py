"""What the commands' options have in common."""

import argparse
import math
from collections.abc import Callable
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

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def number(kind: type, low: float, high: float = math.inf, below: bool = False) -> Callable:
    """An option's type: an int or float from `low` to `high`, or to just below it."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (below and value == high) or math.isinf(value):
            upper = "" if math.isinf(high) else f" {'below' if below else 'to'} {high:g}"
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g}{upper}")
        return value

    return parse


def add_base_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="auto", metavar="B",
                        help="directory, gpt2[-medium|-large|-xl], mini, or auto: gpt2 where it "
                             "can be had, else mini (default: auto)")


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
