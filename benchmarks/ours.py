"""This project's side of every benchmark: the only file here that calls the training code."""

import signal
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import train
from adapters.merge import merge, unwrap
from common.device import Device
from common.signals import HANDLED
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from data.windows import Windows
from evaluate import Scores
from evaluate import evaluate as score
from lora import files
from lora.inject import inject
from lora.layer import LoRAConfig
from model.gpt2 import GPT2, GPT2Config
from model.kernels.fast import accelerate
from storage.weights import load_config, load_gpt2, save_gpt2
from training.build import build_model, load_data, resolve
from training.options import Options, parse_options
from training.ranks import ALONE, Ranks
from training.report import read_run

__all__ = ["score"]  # `evaluate` of evaluate.py


def command_line(method: str, *more: object, **values: object) -> list[str]:
    """Return arguments of `train.py`. A keyword is an option: `max_steps=3` is `--max-steps 3`, and
    True or False a switch that is on or off. `more` comes last, so it wins.
    """
    argv = [method]
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            argv.append(flag)
        elif value is not False:
            argv += [flag, str(value)]
    return [*argv, *map(str, more)]


def options(method: str, *more: object, **values: object) -> Options:
    """Return `train.py`'s options by `command_line`, defaults included."""
    return parse_options("-", command_line(method, *more, **values))


@cache  # so that what is timed does not load it
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base, load_config(base).vocab_size)


def data(made: Options) -> tuple[Windows, Windows]:
    """Return the windows of the book's two parts; `--base` is a directory."""
    base = Path(made.base)
    loaded = load_data(made, base)
    assert isinstance(loaded.training, Windows)
    assert isinstance(loaded.validation, Windows)
    return loaded.training, loaded.validation


def make_trainer(asked: Options, ranks: Ranks = ALONE, fast: bool = True) -> train.Trainer:
    """Build what `train.py` has before its first step; `--base` is a directory.

    `fast`: with the model as `train.py` makes it, or as plain as `model/gpt2.py`.
    """
    base = Path(asked.base)
    device = Device.pick(asked.device, asked.precision, train=True)
    device.set_tf32(asked.allow_tf32)
    loaded = load_data(asked, base)
    made = resolve(asked, asked.base, device, loaded)
    if fast:
        return train.make_trainer(made, base, loaded, device, ranks)
    model = build_model(made, base, device.dtype, device.torch_device)
    return train.Trainer(made, model, loaded, device, ranks)


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


def run(argv: Sequence[str]) -> dict:
    """Run `train.py ARGV` in this process; return its `run.json`."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        train.main(argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return read_run(parse_options("-", list(argv)).out)


def load(base: Path, adapter: Path | None, device: Device) -> GPT2:
    """Load a base and, if given, an adapter on it, as `evaluate.py` and `generate.py` do."""
    model = load_gpt2(base, device.dtype)
    if adapter:
        files.load_adapter(model, adapter)
    device.place(model)
    accelerate(model)
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's own tensors, not copies, by the names in PEFT's file."""
    return files.adapter_tensors(model)


def save_adapter(model: GPT2, made: Options, directory: Path) -> None:
    """Save the model's adapter in PEFT's format, as `train.py` does."""
    assert made.lora
    files.save_adapter(model, made.lora, directory, made.base)


def save_merged(model: GPT2, directory: Path) -> None:
    """Merge the model's adapter into it and save the whole; the adapter is gone."""
    merge(model)
    unwrap(model)
    save_gpt2(model, directory)


def random_model(config: GPT2Config, rank: int | None) -> GPT2:
    """Make a model with random weights and, with a rank, LoRA on c_attn."""
    model = GPT2(config)
    if rank:
        inject(model, LoRAConfig(r=rank, target_modules=("c_attn",)))
    return model
