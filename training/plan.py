"""Start a run, and plan it: everything that is known before the weights are loaded."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from common.device import Device, tune_process
from common.errors import UserError
from common.processes import Processes
from data.windows import Batch
from evaluation.compare import RUN, read_run
from storage.hub import find_base
from training.data import Data, load_data
from training.directory import refuse_inputs_as_output, refuse_used_directory
from training.identity import RunIdentity, refuse_another_run, run_identity
from training.options import Options, Settings
from training.recipe import count_steps, fill_in, with_rate


@contextmanager
def launch(options: Options) -> Iterator[tuple[Device, Processes]]:
    """Join the processes that `torchrun` started, and yield the device and the processes."""
    processes = Processes.from_environment()
    device = Device.pick(options.device, options.precision, train=True)
    tune_process(device)
    with processes.joined(device.torch_device):
        prepare_device(options, device)
        yield device, processes


def prepare_device(options: Options, device: Device) -> None:
    """Set up the device for a run. Raises UserError for options that do not fit the device."""
    device.set_tf32(options.allow_tf32)
    kind = device.torch_device.type
    if options.compile:
        if kind == "cpu":
            raise UserError("--compile: makes steps slower on a CPU (docs/speed.md); omit it")
        device.check_compiler()
    if options.gradient_checkpointing and kind == "mps":  # pytorch#127676
        raise UserError(
            "--gradient-checkpointing: on MPS, the second forward pass would draw other dropout "
            "masks; use --grad-accum to save memory"
        )


@dataclass(frozen=True)
class Plan:
    """A run of `train.py` before its weights are loaded. `identity` is what a resumed run must
    share with the run that it continues.
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

    options = fill_in(options, base, device)  # all values, except a computed lr
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
        replace(identity, options=settings.as_json()),  # now with the computed lr
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
    refuse_another_run(options.out / RUN, read_run(options.out), identity)
    return True
