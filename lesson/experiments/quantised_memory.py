"""Memory and time of a four-bit base: `python -m lesson.experiments.quantised_memory`

Varied: the format of the frozen base (bf16, int8, NF4), with and without gradient checkpointing.
Fixed: GPT-2 medium with random weights, LoRA of rank 8 on c_attn, 4 windows of
128 tokens, bf16. Each run is a new process.
Measured: the peak memory of the whole process in 10^6 bytes, including loading, and the CPU seconds
of each step after the first. CPU seconds count all threads.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.ours import Steps
from common.cli import print_table
from common.device import Device, tune_process
from lesson.experiments.common import as_command, experiment
from model.gpt2 import GPT2, GPT2Config
from storage.weights import save_gpt2
from training.options import parse_options

MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
STEPS = 3
CHECKPOINTING = ("--gradient-checkpointing",)
RUNS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8": ("--quantise", "int8"),
    "nf4": ("--quantise", "nf4"),
    "bf16, checkpointing": CHECKPOINTING,
    "nf4, checkpointing": ("--quantise", "nf4", *CHECKPOINTING),
}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), computed in a new process.

    A process reports its peak memory since it began. On Linux, a child also inherits the peak of
    its parent, so the parent must not load a model.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def save_random_base(directory: Path) -> None:
    """Write a GPT-2 medium in fp16 with random weights. Memory and speed do not depend on them."""
    torch.manual_seed(0)
    save_gpt2(GPT2(MEDIUM), directory, torch.float16)


def train(base: Path, options: Sequence[str]) -> dict[str, Any]:
    """Take steps as in `train.py`. Return the CPU seconds after the first step, and the peak."""
    tune_process(Device.pick("cpu"))
    words = ["lora", "--base", str(base), "--batch-size", "4"]
    words += ["--device", "cpu", "--precision", "bf16", *options]
    trainer = Steps(parse_options("-", words))
    seconds = []
    for _, batch in zip(range(STEPS), trainer.batches(), strict=False):
        began = time.process_time()
        trainer.step(batch)
        seconds.append(time.process_time() - began)
    return {"seconds": seconds[1:], "peak_mb": trainer.device.peak_memory_mb()}


def measure() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        apart(save_random_base, base)
        for name, options in RUNS.items():
            found[name] = apart(train, base, options)
            print(f"{name}: {found[name]}", flush=True)
    report(found)
    return found


def report(found: dict[str, Any]) -> None:
    """Print the peak of each run, the median time of a step, and this time relative to bf16."""
    rows = []
    for name, run in found.items():
        time_of_step = median(run["seconds"])
        ratio = time_of_step / median(found["bf16"]["seconds"])
        rows.append([name, f"{run['peak_mb'] / 1e3:.2f}", f"{time_of_step:.1f}", f"{ratio:.2f}"])
    print_table(("base", "peak GB", "CPU seconds a step", "of bf16's"), rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return experiment("quantised_memory", measure, None, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
