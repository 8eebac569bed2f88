"""Memory and time of a four-bit base: `python -m lesson.experiments.quantised_memory`

Varied: the format of the frozen base (bf16, int8, NF4), with and without gradient checkpointing.
Fixed: a gpt2-xl with random weights (`--short`: mini), LoRA of rank 8 on c_attn, 4 windows of 128
tokens, bf16. Each run is a separate process, and a round runs all of them in sequence.
Measured: the peak memory of the whole process, including loading, and the CPU seconds of all steps
except the first. CPU seconds count all threads, and are also relative to bf16 in the same round.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.ours import Trainer
from common.cli import number, print_table
from common.device import Device, tune_process
from model.gpt2 import GPT2, GPT2Config
from storage.hub import MINI
from storage.weights import save_gpt2
from training.options import ROOT, parse_options

XL = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
CHECKPOINTING = ("--gradient-checkpointing",)
RUNS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8": ("--quantise", "int8"),
    "nf4": ("--quantise", "nf4"),
    "bf16, checkpointing": CHECKPOINTING,
    "nf4, checkpointing": ("--quantise", "nf4", *CHECKPOINTING),
}


def save_random_base(directory: Path) -> None:
    """Write a gpt2-xl in fp16 with random weights. Memory and speed do not depend on weights."""
    torch.manual_seed(0)
    save_gpt2(GPT2(XL), directory, torch.float16)


def measure(base: Path, options: Sequence[str], steps: int) -> dict[str, Any]:
    """Take steps as in `train.py`. Return the CPU seconds after the first step, and the peak."""
    tune_process(Device.pick("cpu"))
    words = ["lora", "--base", str(base), "--batch-size", "4"]
    words += ["--device", "cpu", "--precision", "bf16", *options]
    trainer = Trainer(parse_options("-", words))
    seconds = []
    for _, batch in zip(range(steps), trainer.batches(), strict=False):
        began = time.process_time()
        trainer.step(batch)
        seconds.append(time.process_time() - began)
    return {"seconds": seconds[1:], "peak_mb": trainer.device.peak_memory_mb()}


def measure_apart(base: Path, name: str, steps: int) -> dict[str, Any]:
    """Return the result of `measure` in a separate process."""
    command = [sys.executable, "-m", __spec__.name, "--measure", name, "--base", str(base)]
    done = subprocess.run(
        [*command, "--steps", str(steps)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_rounds(base: Path, names: Sequence[str], rounds: int, steps: int) -> dict[str, list]:
    """Return each run's measurement in each round. Every other round runs in reverse."""
    found: dict[str, list] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[:: -1 if i % 2 else 1]:
            found[name].append(measure_apart(base, name, steps))
            print(f"round {i + 1}: {name}: {found[name][-1]}, load {os.getloadavg()[0]:.1f}")
    return found


def report(found: dict[str, list]) -> None:
    """Print the peak of each run, and the time relative to bf16 as median and range."""
    first = next(iter(found))
    rows = []
    for name, rounds in found.items():
        peak = max(run["peak_mb"] for run in rounds)
        times = [median(run["seconds"]) for run in rounds]
        ratios = [t / median(run["seconds"]) for t, run in zip(times, found[first], strict=True)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        rows.append([name, f"{peak / 1e3:.2f}", f"{median(times):.1f}", ratio])
    print_table(("base", "peak GB", "CPU seconds a step", f"of {first}'s"), rows)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="mini in place of gpt2-xl")
    parser.add_argument("--base", type=Path, help="a base directory in place of gpt2-xl")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    parser.add_argument("--rounds", type=number(int, 1), default=1)
    parser.add_argument("--steps", type=number(int, 2), default=2)
    parser.add_argument("--measure", choices=RUNS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, list]:
    args = parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.base, RUNS[args.measure], args.steps)))
        return {}
    with tempfile.TemporaryDirectory() as folder:
        base = MINI if args.short else args.base
        if base is None:
            base = Path(folder)
            # A separate process: on Linux, children inherit a process's peak memory.
            maker = multiprocessing.get_context("spawn").Process(
                target=save_random_base, args=(base,)
            )
            maker.start()
            maker.join()
        found = measure_rounds(base, args.only, args.rounds, args.steps)
    report(found)
    return found


if __name__ == "__main__":
    main()
