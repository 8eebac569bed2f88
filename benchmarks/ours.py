"""This project's side of every benchmark: the only file here that calls the training code."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

from torch import Tensor, nn

import train
from common.device import Device
from common.processes import Processes
from common.signals import HANDLED
from data.tokenizer import Tokenizer, load_tokenizer
from data.windows import Batch, Windows
from evaluation.scores import Scores
from evaluation.scores import evaluate as score
from lora import load_adapter, merge, trained_parameters, unwrap
from model.gpt2 import GPT2
from model.kernels.fast import set_kernels
from storage.runs import read_run
from storage.weights import load_config, load_gpt2, save_gpt2
from training.launch import prepare_device
from training.model import load_model
from training.options import Options, parse_options
from training.plan import load_data, make_plan
from training.trainer import trainer_for


def command_line(method: str, *more: object, **values: object) -> list[str]:
    """Return arguments of `train.py`. A keyword is an option: `max_steps=3` is `--max-steps 3`.
    True or False switches a flag on or off. `more` comes last, so `more` wins.
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
    """Return the options of `train.py` for a `command_line`, including defaults."""
    return parse_options("-", command_line(method, *more, **values))


@cache  # so that a timed call does not load the tokenizer
def tokenizer(base: Path) -> Tokenizer:
    return load_tokenizer(base, load_config(base).vocab_size)


def data(made: Options) -> tuple[Windows, Windows]:
    """Return the training windows and validation windows. `--base` must be a directory."""
    loaded = load_data(made, Path(made.base))
    assert isinstance(loaded.training, Windows)
    assert isinstance(loaded.validation, Windows)
    return loaded.training, loaded.validation


class Steps:
    """The steps of a run of `train.py`, one by one. Writes no file."""

    def __init__(self, options: Options, processes: Processes | None = None):
        self.device = Device.pick(options.device, options.precision, train=True)
        prepare_device(options, self.device)
        self.plan = make_plan(options, self.device, processes or Processes())
        self.options = self.plan.options
        self.data = self.plan.data
        self.total_steps = self.plan.total_steps
        self.steps_done = 0
        self.model = load_model(self.plan)
        self.set_up()

    def set_up(self) -> None:
        """Make the optimizer. Call this again to train other parameters."""
        self.trainer = trainer_for(self.plan, self.model)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return trained_parameters(self.model)

    @cached_property
    def lr(self) -> float:
        """Return the peak rate. Searches the rate if the options leave it open."""
        return self.options.lr or train.search_rate(self.plan, self.trainer).rate

    def batches(self, first: int = 0) -> Iterator[Batch]:
        return self.plan.batches(first)

    def step(self, batch: Batch) -> Tensor:
        """Take the next step of the schedule. Return the loss, summed over the batch's tokens."""
        warmup = self.options.warmup_ratio
        lr = train.learning_rate(self.steps_done, self.total_steps, self.lr, warmup)
        loss, _ = train.train_step(self.trainer, batch, lr)
        self.steps_done += 1
        return loss

    def evaluate(self) -> Scores:
        return train.validate(self.plan, self.trainer, self.data.validation)


def step(steps: Steps, batch: Batch) -> float:
    """Train on one batch. Return the loss in nats per token."""
    return steps.step(batch).item() / batch.num_tokens


def evaluate(model: GPT2, windows: Windows, device: Device, block_size: int) -> Scores:
    """Return the scores of `evaluate.py` on the windows' text, in consecutive windows."""
    consecutive = replace(windows, block_size=block_size, stride=block_size, label_shift=1)
    return score(model, consecutive, device)


def run(argv: Sequence[str]) -> dict:
    """Run `train.py ARGV` in this process. Return its `run.json`."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        train.main(argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return read_run(parse_options("-", list(argv)).out)


def load(base: Path, adapter: Path | None, device: Device) -> GPT2:
    """Load a base and, if given, an adapter, as `evaluate.py` and `generate.py` do."""
    model = load_gpt2(base, device.dtype)
    if adapter:
        load_adapter(model, adapter)
    model.to(device.torch_device)
    set_kernels(model, "fast")
    return model


def save_merged(model: GPT2, directory: Path) -> None:
    """Merge the model's adapter into the base, remove the adapter, and save the model."""
    merge(model)
    unwrap(model)
    save_gpt2(model, directory)
