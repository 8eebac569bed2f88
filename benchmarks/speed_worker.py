"""Run one side of one comparison of `speed.py` in this process, and print its figures as JSON.

Only their side imports PEFT and transformers, because the imports would add memory to our side.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import ours
from common.device import Device, tune_process
from common.errors import run_command
from model.gpt2 import GPT2, GPT2Config
from storage.weights import save_gpt2
from training.options import Options

COMPARED = 3  # first steps, without dropout. Both sides must have the same losses
WARM_UP = 2
Step = Callable[[], float]  # takes the next training step and returns its loss


@dataclass(frozen=True)
class Task:
    """One measurement: time and memory of training steps on one side."""

    base: str  # a directory
    method: str = "lora"  # or full
    precision: str = "fp32"
    side: str = "ours"  # theirs, or alike: theirs with an allocator that keeps freed memory
    steps: int = 12  # timed, after COMPARED and WARM_UP steps
    batch_size: int = 16
    block_size: int = 128

    @property
    def all_steps(self) -> int:
        return COMPARED + WARM_UP + self.steps

    def options(self) -> Options:
        """Return the options of `train.py` for this task, which both sides follow."""
        return ours.options(
            self.method,
            base=self.base,
            precision=self.precision,
            batch_size=self.batch_size,
            block_size=self.block_size,
            max_steps=self.all_steps,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the task in the first argument, or make a base in the directory `--base DIR`."""
    warnings.simplefilter("ignore")  # libraries warn about each other
    words = sys.argv[1:] if argv is None else argv
    if words[0] == "--base":
        save_gpt2(GPT2(GPT2Config()), Path(words[1]))  # 124M random weights
        return
    print(json.dumps(measure(Task(**json.loads(words[0])))))


def measure(task: Task) -> dict[str, Any]:
    """Take the steps. Return the compared losses, the seconds of each timed step and their median,
    and the peak memory in MB.
    """
    device = Device.pick("auto", task.precision, train=True)
    device.set_tf32(False)  # for both sides
    if task.side != "theirs":
        tune_process(device)  # as train.py does
    model, step = our_side(task) if task.side == "ours" else their_side(task, device.torch_device)

    model.eval()  # without dropout, because the sides draw different masks
    losses = [step() for _ in range(COMPARED)]
    model.train()
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(task.steps):
        began = time.perf_counter()
        step()  # ends with the loss as a Python number, which waits for a GPU
        seconds.append(time.perf_counter() - began)
    return {
        "losses": losses,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "peak_mb": device.peak_memory_mb(),
    }


def our_side(task: Task) -> tuple[nn.Module, Step]:
    """Return the model of `train.py`, and its training step."""
    trainer = ours.Steps(task.options())
    batches = trainer.batches()
    return trainer.model, lambda: ours.step(trainer, next(batches))


def their_side(task: Task, device: torch.device) -> tuple[nn.Module, Step]:
    """Return transformers' model with its defaults, with PEFT's adapter for LoRA, and a step of the
    plain loop on the same batches, at the same learning rates.
    """
    from transformers import AutoModelForCausalLM

    from benchmarks import peft_loop

    options = task.options()
    model: Any = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.float32)
    torch.manual_seed(options.seed)  # seeds A
    if task.method == "lora":
        model = peft_loop.add_lora(model, options)
    model.to(device)
    train_on = peft_loop.make_step(model, options, task.precision)
    windows, _ = ours.data(options)
    order = windows.epoch_order(options.seed, 0)
    numbers = count()

    def step() -> float:
        i = next(numbers)
        batch = order[i * task.batch_size : (i + 1) * task.batch_size]
        inputs, targets = windows.inputs_and_targets(batch)  # (B, T) each
        lr = peft_loop.learning_rate(i, task.all_steps, options)
        return train_on(inputs.to(device), targets.to(device), lr)

    return model, step


if __name__ == "__main__":
    run_command(main)
