"""Estimate how long a run takes on this machine: `python -m benchmarks.estimate lora --base mini`.

Takes the options of train.py, loads the base and the data as train.py does, and times some training
steps and one validation. Writes no file. Saving, which is not timed, is slow only for large models.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from benchmarks import ours
from common.device import Device, tune_process
from common.errors import run_command
from data.windows import Batch
from train import train_step
from training.options import parse_options
from training.plan import Plan
from training.search import SHORT_STEPS

MEASURED_SECONDS = 8.0  # of training steps
FEWEST_STEPS = 3


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__, argv)
    tune_process(Device.pick(options.device, options.precision, train=True))
    trainer = ours.Steps(options)

    step = seconds_per_step(trainer)
    began = time.perf_counter()
    trainer.evaluate()
    validation = time.perf_counter() - began
    print(describe(trainer, step, validation))


def seconds_per_step(trainer: ours.Steps) -> float:
    """Return the mean time of a training step, measured over about `MEASURED_SECONDS`."""
    batches = cycle(trainer.batches())  # a short run has too few
    take_steps(trainer, batches, 1)  # warms up
    first = take_steps(trainer, batches, 1)
    count = max(FEWEST_STEPS, round(MEASURED_SECONDS / first))
    return take_steps(trainer, batches, count) / count


def take_steps(trainer: ours.Steps, batches: Iterator[Batch], count: int) -> float:
    """Take `count` training steps. Return the time in seconds."""
    began = time.perf_counter()
    for batch in islice(batches, count):
        loss, _ = train_step(trainer.trainer, batch, lr=1e-6)
    loss.item()  # waits for a GPU
    return time.perf_counter() - began


def describe(trainer: ours.Steps, step: float, validation: float) -> str:
    """Return two lines: the estimated time of the run, and the peak memory so far.

    `step` and `validation` are the times of a step and of a validation, in seconds.
    """
    steps = trainer.total_steps
    if trainer.options.lr is None:  # three short runs find the rate
        steps += 3 * min(SHORT_STEPS, steps)
    validations = count_validations(trainer.plan)
    training = steps * step
    validating = validations * validation
    device = trainer.device
    return (
        f"estimate: {duration(training + validating)} = {duration(training)} for {steps:,} steps "
        f"of {step:.3g} s + {duration(validating)} for {validations:,} validations of "
        f"{validation:.3g} s\n"
        f"peak memory so far: {device.peak_memory_mb():,.0f} MB ({device.name}, {device.precision})"
    )


def count_validations(plan: Plan) -> int:
    """Count the validations of a run: of the base, of an initial adapter, and in training."""
    before = 2 if plan.options.init_adapter else 1
    return before + sum(plan.validation_is_due(step + 1) for step in range(plan.total_steps))


def duration(seconds: float) -> str:
    """Return a time with its unit: "8.4 s", "95 s", "12 min" or "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    run_command(main)
