"""Time training steps of this project against PEFT and transformers, side by side.

`python -m benchmarks.speed` trains GPT-2 124M with random weights in fp32 and in the default
precision of `train.py`, with LoRA against PEFT and in full against transformers. Each side runs in
a separate process, one after the other, for several rounds, and ratios are taken within a round. So
a machine that slows down slows both sides. Before a time counts, the first steps run without
dropout, and both sides must have the same losses.

Their side runs with its defaults: stock activation and attention, cross-entropy over all logits,
mixed precision by autocast. Batches, dropouts, optimizer (fused AdamW) and clipping are the same.
Our commands make the allocator keep freed memory (`tune_process`). On a CPU under Linux, their side
is measured twice: with the allocator as it comes, and set as here.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.parity_report import machine, versions
from benchmarks.speed_worker import Task
from common.cli import Parser, number, print_table
from common.device import Device
from common.errors import RunError, run_command
from common.files import read_json, write_json
from storage.hub import find_base
from training.options import ROOT

RESULTS = Path(__file__).parent / "results"
# Allowed relative difference of the losses. In fp32, only sums in another order may differ.
SAME_LOSS = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
RATIOS = {
    "theirs": "their time / ours, theirs as it comes",
    "alike": "their time / ours, allocator alike",
}
COLUMNS = ("", "our seconds per step", *RATIOS.values(), "our peak MB", "our memory / theirs")
Record = dict[str, Any]  # a Task and its figures in one round


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_args(argv)
    if opts.stored:
        for path in opts.stored:
            print_table(COLUMNS, table(read_json(path)["measurements"]))
        return

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also ends the measured process
    with TemporaryDirectory() as folder:
        if not opts.base:
            opts.base = f"{folder}/GPT-2 124M, random weights"
            run_apart("--base", opts.base)
        race(opts)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmarks.speed", description=__doc__)
    parser.add_argument("--base", metavar="B", help="default: GPT-2 124M with random weights")
    parser.add_argument("--rounds", type=number(int, 1), default=3, metavar="N", help="default: 3")
    parser.add_argument("--steps", type=number(int, 1), default=12, metavar="N", help="default: 12")
    parser.add_argument("--quick", action="store_true", help="one round of 2 steps on mini")
    parser.add_argument("stored", nargs="*", type=Path, help="only print these results' tables")
    opts = parser.parse_args(argv)
    if opts.quick:
        opts.base = opts.base or "mini"
        opts.rounds, opts.steps = 1, 2
    return opts


def race(opts: Namespace) -> None:
    """Run all rounds. After each round, write the result. At the end, print it."""
    base_name, base = find_base(opts.base)
    device = Device.pick(train=True)
    results: dict[str, Any] = {
        "base": Path(base_name).name,  # without the path
        **about(f"make bench ARGS='--rounds {opts.rounds} --steps {opts.steps}'"),
        "load_average": [],  # over 1, 5 and 15 minutes, at the start of each round
        "measurements": [],
    }
    path = result_file("quick" if opts.quick else "speed")

    for i in range(opts.rounds):
        results["load_average"].append(os.getloadavg())
        print(f"round {i + 1}, load average {os.getloadavg()[0]:.2f}", flush=True)
        for method in ("lora", "full"):
            for precision in dict.fromkeys(("fp32", device.precision)):
                task = Task(str(base), method, precision, steps=opts.steps)
                results["measurements"] += measure(task, i)
        write_json(path, results)

    print_table(COLUMNS, table(results["measurements"]))
    print(f"saved in {path}")


def about(command: str) -> dict[str, Any]:
    """Return how, when and where a result is measured."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def result_file(kind: str) -> Path:
    name = re.sub(r"\W+", "-", f"{kind} {machine()}")
    return RESULTS / f"{name}.json"


def measure(task: Task, i: int) -> list[Record]:
    """Measure all sides, in reverse order in every other round. Return the records of round `i`.

    Raises RunError if the sides do not compute the same losses.
    """
    sides = ["ours", "theirs"]
    if sys.platform == "linux" and not torch.cuda.is_available():
        sides.append("alike")  # elsewhere, `tune_process` does not change the allocator
    if i % 2:
        sides.reverse()

    records = []
    for side in sides:
        task = replace(task, side=side)
        found = json.loads(run_apart(json.dumps(asdict(task))))
        records.append({**asdict(task), "base": Path(task.base).name, "round": i, **found})
        print(f"  {title(records[-1])}, {side}: {found['median']:.4g} s", flush=True)
    check_same_losses(records)
    return records


def run_apart(*words: str) -> str:
    """Run the worker in a separate process, and return its output. Raises RunError if it fails.

    On Linux, a process inherits the peak memory of its parent, so this process must stay small.
    """
    command = [sys.executable, "-m", "benchmarks.speed_worker", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        reason = ended.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise RunError(f"a measured process ended with status {ended.returncode}: {reason}")
    return ended.stdout


def check_same_losses(records: list[Record]) -> None:
    """Raise RunError if two sides compute different losses, because then times say nothing."""
    first, *others = records
    for other in others:
        if not np.allclose(first["losses"], other["losses"], SAME_LOSS[first["precision"]], 0):
            raise RunError(
                f"{title(first)}: the losses differ, so no time is compared: {first['losses']} "
                f"({first['side']}) and {other['losses']} ({other['side']})"
            )


def title(record: Record) -> str:
    return f"{record['method'].replace('lora', 'LoRA')}, {record['precision']}"


def figures(measurements: list[Record]) -> dict[str, dict[str, list[float]]]:
    """Return for each method and precision our times and memory, and the ratios of each round."""
    rounds: dict[str, dict[str, list[Record]]] = {}  # title -> side -> a record for each round
    for record in measurements:
        rounds.setdefault(title(record), {}).setdefault(record["side"], []).append(record)

    found = {}
    for name, sides in rounds.items():
        found[name] = {
            "seconds": [record["median"] for record in sides["ours"]],
            "peak_mb": [record["peak_mb"] for record in sides["ours"]],
            "memory": quotients(sides["ours"], sides["theirs"], "peak_mb"),
        }
        for side in RATIOS.keys() & sides:
            found[name][side] = quotients(sides[side], sides["ours"], "median")
    return found


def quotients(over: list[Record], under: list[Record], key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(over, under, strict=True)]


def table(measurements: list[Record]) -> list[list[str]]:
    """Return a row for each method and precision: medians over the rounds (least..most)."""
    rows = []
    for name, found in figures(measurements).items():
        ratios = [spread(found[side]) if side in found else "-" for side in RATIOS]
        peak = f"{statistics.median(found['peak_mb']):,.0f}"
        memory = f"{statistics.median(found['memory']):.2f}"
        rows.append([name, spread(found["seconds"]), *ratios, peak, memory])
    return rows


def spread(values: Sequence[float]) -> str:
    """Format the median and, with several values, the range."""
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f}..{max(values):.2f})" if len(values) > 1 else middle


if __name__ == "__main__":
    run_command(main)
