"""How fast and how small: this project against PEFT and transformers, measured side by side.

`python -m benchmarks.speed` runs every contender in a process of its own, one after the other,
round after round, so that a machine that slows down slows all of them; ratios are taken within a
round. The base is a GPT-2 124M of random weights, made on the spot. All sides have the same
batches, dropouts, optimizer (fused AdamW) and clipping. The examiners run as they come: stock
activation and attention, cross-entropy over their logits, mixed precision by autocast, and for
LoRA, evaluation and generation also with the frozen weights themselves in low precision; our side
keeps freed memory as its commands do (`hardware.keep_freed_memory`). One difference is theirs to
win: PEFT saves an adapter without waiting for the disk, we wait.
"""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.parity_report import versions
from benchmarks.speed_report import (
    draw_growth,
    draw_ratios,
    growth_series,
    print_growth,
    print_report,
    summarise,
)
from benchmarks.speed_worker import Task
from cli import ROOT, Parser, number
from errors import RunError, run_command
from files import write_json
from hardware import PRECISIONS, pick_device
from model.checkpoint import load_config
from model.hub import find_base
from plots import pyplot

KINDS = {"train": ("train", "products"), "evaluate": ("evaluate",), "generate": ("generate",),
         "adapter": ("save", "load")}
PARTS = (*KINDS, "growth")
GROWTH = {"batch_size": (4, 8, 16, 32, 64), "block_size": (64, 128, 256, 512, 1024),
          "r": (1, 4, 16, 64)}
GROWTH_ROUNDS, GROWTH_STEPS = 2, 1
GROWTH_BATCH = 4  # while the block grows
STEEPEST = {"batch_size": 2, "block_size": 4, "r": 2}  # growth of memory's growth, size doubled


def main() -> int:
    opts = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the process measured as well
    opts.load_average = os.getloadavg()
    if opts.load_average[0] > 0.5:
        print(f"note: others compute on this machine (load average {opts.load_average[0]:.1f}); "
              "ratios suffer less than times")
    with TemporaryDirectory() as folder:
        if opts.base is None:
            opts.directory = Path(folder)
            run_apart(Task("base", folder))
        opts.positions = load_config(opts.directory).n_positions
        opts.width = load_config(opts.directory).n_embd
        failed = measure_rounds(opts)["failed"] if opts.only != ["growth"] else {}
        if "growth" in opts.only:
            failed |= measure_growth(opts)["failed"]
    return 1 if failed else 0


def parse_args() -> Namespace:
    parser = Parser(prog="benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=None, metavar="B",
                        help="as train.py's (default: GPT-2 124M with random weights)")
    parser.add_argument("--quick", action="store_true",
                        help="one round of bf16 on mini, in less than two minutes")
    parser.add_argument("--rounds", type=number(int, 1), help="default: 5")
    parser.add_argument("--steps", type=number(int, 1),
                        help="timed after the warm-up (default: 3; --quick: 1; on CUDA 20)")
    parser.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), metavar="P",
                        help="default: fp32 and bf16, on CUDA fp16 as well; --quick: bf16")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(KINDS), metavar="PART",
                        help=f"of {', '.join(PARTS)}; default: all but growth, which is time and "
                             "memory against batch, block and rank")
    parser.add_argument("--compile", action="store_true",
                        help="also with torch.compile (on CUDA in any case)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results",
                        metavar="DIR", help="where the figures and pictures go")
    opts = parser.parse_args()
    device = pick_device(opts.device)
    opts.device, cuda = device.type, device.type == "cuda"
    opts.base = opts.base or ("mini" if opts.quick else None)
    opts.directory = find_base(opts.base)[1] if opts.base else None
    opts.rounds = opts.rounds or (1 if opts.quick else 5)
    opts.steps = opts.steps or (20 if cuda else 1 if opts.quick else 3)
    opts.warm_up = 3 if cuda else 2
    all_of_them = tuple(PRECISIONS) if cuda else ("fp32", "bf16")
    opts.precision = opts.precision or (("bf16",) if opts.quick else all_of_them)
    opts.compile = (opts.compile or cuda) and has_compiler()
    return opts


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs; says so if not."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        print(f"compiled runs are left out: torch.compile needs a C++ compiler, and there is no "
              f"{compiler}")
    return shutil.which(compiler) is not None


def facts(opts: Namespace) -> dict:
    """What the figures depend on, and nothing that names a machine."""
    return {"base": Path(opts.base).name if opts.base else "GPT-2 124M, random weights",
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine_kind(opts.device), "threads": torch.get_num_threads(),
            "how": " ".join(__doc__.split()), "load_average": opts.load_average,
            "versions": versions(), "rounds": opts.rounds,
            "steps": opts.steps, "warm_up": opts.warm_up, "measurements": [], "failed": {}}


def machine_kind(device: str) -> str:
    """Such as cpu-2-AMD-EPYC."""
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()}-{cpu_model()}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{device}-{name}").strip("-")


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def plan(opts: Namespace) -> list[Task]:
    """The tasks of one round."""
    common = Task("train", str(opts.directory), opts.device, steps=opts.steps,
                  warm_up=opts.warm_up, block_size=min(Task.block_size, opts.positions))
    tasks = []
    for precision in opts.precision:
        task = replace(common, precision=precision)
        for method in ("lora", "full"):
            for compiled in (False, True)[: 1 + opts.compile]:
                tasks += sides(replace(task, method=method, compile=compiled))
        tasks.append(replace(task, kind="products"))
        tasks += sides(replace(task, kind="evaluate"))
        tasks += sides(replace(task, kind="generate", steps=1, warm_up=0))  # it warms up itself
    tasks += sides(replace(common, kind="save")) + sides(replace(common, kind="load"))
    wanted = {kind for part in opts.only for kind in KINDS.get(part, ())}
    return [task for task in tasks if task.kind in wanted]


def sides(task: Task) -> list[Task]:
    """Ours and theirs; theirs also with frozen weights in low precision, where it is low."""
    theirs = replace(task, side="theirs")
    low = task.precision != "fp32" and task.method == "lora" and not task.compile
    return [task, theirs, *[replace(theirs, weights="low")] * low]


def measure_rounds(opts: Namespace) -> dict:
    """Every task once a round, every other round in reverse; saved after each."""
    tasks, results = plan(opts), facts(opts)
    parts = [part for part in KINDS if part in opts.only]
    name = "speed" if parts == list(KINDS) else "-".join(parts)  # a part replaces not the whole
    path = output(opts, name, results)
    for i in range(opts.rounds):
        for task in tasks[:: -1 if i % 2 else 1]:
            if task.name not in results["failed"]:
                measure(task.name, task, results, round=i)
        results["summary"] = summarise(results["measurements"])
        write_json(path, results)
    print_report(results["summary"])
    print(f"\nsaved in {path}")
    if pyplot and results["summary"]["ratios"]:
        draw_ratios(results["summary"], path.with_suffix(".png"))
    return results


def output(opts: Namespace, what: str, results: dict) -> Path:
    return opts.out / f"{'quick-' * opts.quick}{what}-{results['machine']}.json"


def measure(name: str, task: Task, results: dict, **labels) -> None:
    """Run the task, keep and print its figures; of a failure the reason."""
    try:
        figures = run_apart(task)
    except RunError as error:
        results["failed"][name] = str(error)
        print(f"error: {name}: {error}; left out from here on", file=sys.stderr, flush=True)
        return
    described = {k: v for k, v in asdict(task).items() if k not in ("base", "device")}
    results["measurements"].append({"name": name, **labels, **described, **figures})
    if "median" in figures:
        name += f": {figures['median']:.4g} s, peak {figures['peak_mb']:,.0f} MB"
    print(f"round {labels['round'] + 1}: {name}", flush=True)


def run_apart(task: Task, *module: str) -> dict:
    """The figures of a task measured in a process of its own. Raises RunError if that fails.

    `module`: what `python -m` starts, and its arguments before the task.

    Linux starts a process's peak memory at that of the one which starts it: stay small here.
    """
    module = module or ("benchmarks.speed_worker",)
    ended = subprocess.run([sys.executable, "-m", *module, json.dumps(asdict(task))], cwd=ROOT,
                           capture_output=True, text=True)
    if ended.returncode < 0:
        killer = signal.Signals(-ended.returncode)
        memory = " (out of memory?)" if killer == signal.SIGKILL else ""
        raise RunError(f"its process was ended by {killer.name}{memory}")
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if re.search(r"\w", line)]
        lines = lines or [f"exit status {ended.returncode}"]
        said = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise RunError(said.removeprefix("error: "))  # torchrun's own lines come after it
    return json.loads(ended.stdout.splitlines()[-1])


def measure_growth(opts: Namespace) -> dict:
    """Ours and PEFT's LoRA at growing sizes; a size that would not fit in memory ends its axis."""
    results = facts(opts) | {"steps": GROWTH_STEPS, "rounds": GROWTH_ROUNDS, "skipped": {}}
    path = output(opts, "growth", results)
    for i in range(GROWTH_ROUNDS):
        for axis, task in growth_plan(opts):
            series, name = f"{task.name}, {axis}", f"{task.name}, {axis} {getattr(task, axis)}"
            if any(known.startswith(series) for known in results["failed"] | results["skipped"]):
                continue
            needed, free = needed_mb(results["measurements"], axis, task), free_mb(task.device)
            if needed > free:
                results["skipped"][name] = f"needs about {needed:,.0f} MB of {free:,.0f} free"
                print(f"skipped: {name} and larger: {results['skipped'][name]}", flush=True)
                continue
            measure(name, task, results, round=i, axis=axis, contender=task.name)
    results["series"] = growth_series(results["measurements"])
    write_json(path, results)
    print_growth(results["series"])
    print(f"\nsaved in {path}")
    if pyplot and results["series"]:
        draw_growth(results["series"], path.with_suffix(".png"))
    return results


def growth_plan(opts: Namespace) -> Iterator[tuple[str, Task]]:
    precision = "bf16" if "bf16" in opts.precision else opts.precision[0]
    limits = {"batch_size": math.inf, "block_size": opts.positions, "r": opts.width}
    for axis, sizes in GROWTH.items():
        batch = GROWTH_BATCH if axis == "block_size" else Task.batch_size
        task = Task("train", str(opts.directory), opts.device, precision=precision,
                    batch_size=batch, block_size=min(Task.block_size, opts.positions),
                    warm_up=opts.warm_up, steps=GROWTH_STEPS)
        for size in sizes:
            if size <= limits[axis]:
                yield axis, replace(task, **{axis: size})
                yield axis, replace(task, **{axis: size}, side="theirs")


def needed_mb(measurements: list[dict], axis: str, task: Task) -> float:
    """At most so much memory: the last doubling's growth, as much steeper as this axis can be."""
    sizes = {r[axis]: r["peak_mb"] for r in measurements
             if (r["axis"], r["contender"]) == (axis, task.name) and r[axis] < getattr(task, axis)}
    if len(sizes) < 2:
        return 0.0
    before, last = (sizes[size] for size in sorted(sizes)[-2:])
    return last + STEEPEST[axis] * max(0.0, last - before)


def free_mb(device: str) -> float:
    """The memory that a new process can have; infinite where it is not known."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 / 1e6 if found and device == "cpu" else math.inf


if __name__ == "__main__":
    run_command(main)
