"""This project's side of every benchmark: the only file here that calls the training code."""

import signal
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np

import train
from adapters.files import load_adapter
from common.device import Device
from common.signals import HANDLED
from data.windows import Windows
from evaluate import Scores
from evaluate import evaluate as score
from model.gpt2 import GPT2
from model.tokenizer import Tokenizer
from model.tokenizer_files import load_tokenizer
from model.weights import load_config, load_gpt2
from training.build import load_data
from training.options import Options, parse_options
from training.ranks import ALONE, Ranks
from training.report import read_run


def options(method: str, *more: object) -> Options:
    """Return `train.py`'s options, defaults included."""
    return parse_options("-", [method, *map(str, more)])


@cache  # so that what is timed does not load it
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base, load_config(base).vocab_size)


def data(made: Options) -> tuple[Windows, Windows]:
    """Return the windows of the book's two parts; `--base` is a directory."""
    base = Path(made.base)
    return load_data(made, load_config(base), tokenizer(base))


def make_trainer(made: Options, ranks: Ranks = ALONE) -> train.Trainer:
    """Build what `train.py` has before its first step; `--base` is a directory."""
    device = Device.pick(made.device, made.precision, train=True)
    device.set_tf32(made.allow_tf32)
    made = replace(made, precision=device.precision)
    return train.Trainer(made, Path(made.base), device, ranks)


def step(trainer: train.Trainer, batch: np.ndarray) -> float:
    """Train on one batch; return its loss in nats a token."""
    trainer.meter.restart()
    trainer.step(batch)
    return trainer.measure()["loss"]


def evaluate(
    model: GPT2, tokens: np.ndarray, base: Path, device: Device, block_size: int
) -> Scores:
    """Return `evaluate.py`'s scores of these tokens, in consecutive windows."""
    batches = Windows(tokens, block_size, block_size).evaluation_batches()
    return score(model, batches, tokenizer(base), device)


def run(argv: list[str]) -> dict:
    """Run `train.py ARGV` in this process; return its `run.json`."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        with mock.patch.object(sys, "argv", ["train.py", *argv]):
            train.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return read_run(parse_options("-", argv).out)


def load(base: Path, adapter: Path | None, device: Device) -> GPT2:
    """Load a base and, if given, an adapter on it, as `evaluate.py` and `generate.py` do."""
    model = load_gpt2(base, device.dtype)
    if adapter:
        load_adapter(model, adapter)
    return device.place(model)
