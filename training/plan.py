"""Plan a run: everything that is known before the weights are loaded."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from common.device import Device
from common.processes import Processes
from data.windows import Batch
from evaluation.compare import read_run
from storage.hub import find_base
from training.data import Data, load_data
from training.directory import RUN, refuse_inputs_as_output, refuse_used_directory
from training.identity import RunIdentity, refuse_another, run_identity
from training.options import Options, Settings
from training.recipe import count_steps, fill_in, with_rate


@dataclass(frozen=True)
class Plan:
    """A run of `train.py` before its first step. `settings` are the options with all values filled
    in, and `identity` is what a resumed run must share.
    """

    settings: Settings
    base_directory: Path
    data: Data
    identity: RunIdentity
    device: Device
    processes: Processes
    steps_per_epoch: int
    total_steps: int
    micro_batch_size: int  # windows in one forward pass of this process

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yield the batch of each step from step `first` on. Each epoch has a different order."""
        size = self.settings.batch_size
        order = np.empty(0, dtype=np.int64)
        for step in range(first, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == first:
                order = self.data.training.epoch_order(self.settings.seed, epoch)
            yield self.batch(order[position * size : (position + 1) * size])

    def batch(self, indices: np.ndarray) -> Batch:
        """Return this process's share of the windows with these indices (B,)."""
        training = self.data.training
        mine = np.array_split(indices, self.processes.count)[self.processes.number]
        return Batch(training, mine, self.micro_batch_size, training.num_tokens(indices))

    def epoch_ends(self, step: int) -> bool:
        """Return whether an epoch, or the run, ends after `step` steps."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def validation_is_due(self, step: int) -> bool:
        """Return whether to validate after `step` steps: by --eval-every, or as an epoch ends."""
        every = self.settings.eval_every
        return self.epoch_ends(step) or bool(every and step % every == 0)


def make_plan(options: Options, device: Device, processes: Processes) -> Plan | None:
    """Plan the run, or return None if --resume finds that it is finished.

    Raises UserError for a base, a text or an `--out` that does not fit the options.
    """
    if processes.is_main:
        refuse_used_directory(options)
    with processes.main_first():
        base, directory = find_base(options.base)
    if processes.is_main:
        refuse_inputs_as_output(options, directory)

    options = fill_in(options, base, device)
    identity = run_identity(options, directory)
    processes.check_same(asdict(identity))
    if processes.from_main(processes.is_main and is_finished(options, identity)):
        print(f"{options.out}: this run is finished; nothing to resume")
        return None

    data = load_data(options, directory)
    settings = with_rate(options, data.training)
    windows = len(data.training)
    steps_per_epoch, total_steps = count_steps(settings, windows)
    share = math.ceil(min(settings.batch_size, windows) / processes.count)
    return Plan(
        settings,
        directory,
        data,
        replace(identity, options=settings.as_json()),
        device,
        processes,
        steps_per_epoch,
        total_steps,
        micro_batch_size=math.ceil(share / settings.grad_accum),
    )


def is_finished(options: Options, identity: RunIdentity) -> bool:
    """Return whether --resume finds a finished run. Raises UserError for another run."""
    if not options.resume or not (options.out / RUN).exists():
        return False
    refuse_another(options.out / RUN, read_run(options.out), identity)
    return True
