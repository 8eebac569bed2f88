"""Plan a run: everything that is known before the weights are loaded."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.device import Device
from common.processes import Processes
from data.windows import Batch, Dataset, micro_batches
from model.gpt2 import GPT2
from storage.hub import find_base
from training.data import Data, load_data
from training.identity import RunIdentity, run_identity
from training.options import Options
from training.recipe import fill_in
from training.trainer import Trainer, make_trainer

SHORT_STEPS = 24  # of a run that searches the learning rate
MOST_PASSES = 6  # of such a run, or it would have too few batches


@dataclass(frozen=True)
class Plan:
    """A run of `train.py` before its weights are loaded."""

    options: Options  # the precision, the base's name and the values of --init-adapter are known
    base_directory: Path
    data: Data
    identity: RunIdentity  # a resumed run must have the identity of the run that it continues
    device: Device
    processes: Processes
    steps_per_epoch: int
    total_steps: int
    micro_batch_size: int  # windows in one forward pass of this process

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yield the batch of each step from step `first` on. Each epoch has a different order."""
        size = self.options.batch_size
        order = np.empty(0, dtype=np.int64)
        for step in range(first, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == first:
                order = self.data.training.epoch_order(self.options.seed, epoch)
            yield self.batch(order[position * size : (position + 1) * size], self.data.training)

    def batch(self, indices: np.ndarray, data: Dataset) -> Batch:
        """Return this process's share of the windows with these indices (B,)."""
        mine = np.array_split(indices, self.processes.count)[self.processes.number]
        rows = micro_batches(data, mine, self.micro_batch_size)
        return Batch(rows, data.num_tokens(indices))

    @property
    def passes(self) -> float:
        """Return how often, on average, the run reads a token of its training part."""
        return self.total_steps / self.steps_per_epoch * self.data.training.passes

    @property
    def starts_as_the_base(self) -> bool:
        """Return whether the run begins with a new adapter, which changes nothing yet."""
        return self.options.method == "lora" and not self.options.init_adapter

    def short_batches(self) -> list[Batch]:
        """Return the batches of a short run, which searches the learning rate."""
        steps = min(self.total_steps, SHORT_STEPS)
        size = self.options.batch_size
        order = self.data.short.epoch_order(self.options.seed, 0)
        order = short_order(order, steps * size, self.passes)
        return [
            self.batch(order[i : i + size], self.data.short) for i in range(0, len(order), size)
        ]

    def trainer(self, model: GPT2) -> Trainer:
        """Return a trainer for the model of `load_model`, with a new optimizer."""
        return make_trainer(
            model,
            device=self.device,
            processes=self.processes,
            weight_decay=self.options.weight_decay,
            clip=self.options.clip,
            loraplus_lr_ratio=self.options.loraplus_lr_ratio,
        )

    def epoch_ends(self, step: int) -> bool:
        """Return whether an epoch, or the run, ends after `step` steps."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def validation_is_due(self, step: int) -> bool:
        """Return whether to validate after `step` steps: by --eval-every, or as an epoch ends."""
        every = self.options.eval_every
        return self.epoch_ends(step) or bool(every and step % every == 0)


def short_order(order: np.ndarray, count: int, passes: float) -> np.ndarray:
    """Return `count` indices for a short run: the first of `order`, as often as the whole run reads
    its text.

    A model that reads a text again learns it by heart, unless the rate is low, and the short run
    must show this too.
    """
    times = min(max(1, round(passes)), MOST_PASSES)
    return np.resize(order[: math.ceil(count / times)], count)


def make_plan(options: Options, device: Device, processes: Processes) -> Plan:
    """Plan the run. Raises UserError for a base or a text that does not fit the options."""
    with processes.main_first():
        base, directory = find_base(options.base)
    options = fill_in(options, base, device)
    identity = run_identity(options, directory)
    processes.check_same(asdict(identity))

    data = load_data(options, directory)
    windows = len(data.training)
    steps_per_epoch = math.ceil(windows / options.batch_size)
    total_steps = options.epochs * steps_per_epoch
    if options.max_steps:
        total_steps = min(total_steps, options.max_steps)
    share = math.ceil(min(options.batch_size, windows) / processes.count)
    return Plan(
        options,
        directory,
        data,
        identity,
        device,
        processes,
        steps_per_epoch,
        total_steps,
        micro_batch_size=math.ceil(share / options.grad_accum),
    )
