"""Measure time and memory: this project against PEFT and transformers, side by side.

`python -m benchmarks.speed` runs each contender in a separate process, one after the other, for
several rounds. So a machine that slows down slows every contender. Ratios are taken within a round.
Each round begins by recording the load average, which includes the benchmark from the second round
on. The base is a GPT-2 124M with random weights. All sides have the same batch in every step, and
the same dropouts, optimizer (fused AdamW) and clipping. The other side runs with default settings:
stock activation and attention, cross-entropy over all logits, and mixed precision by autocast.
LoRA, evaluation and generation also run with the frozen weights in low precision. Our side keeps
freed memory, as our commands do (`tune_process`). On a CPU under Linux, the other side is measured
a second time with the same allocator setting. The share of matmuls is a share of the self time of
all operations, in one more step under torch.profiler.

`--only growth` measures LoRA by batch, context, rank and model size (mini to gpt2-xl), with one
allocator setting. An exponent of 1 means that time or memory doubles with the size. `--only
scaling` shares one batch among the ranks that torchrun starts on this machine, and reports the
bytes that a rank passes to all_reduce per step.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.parity_report import versions
from benchmarks.speed_report import draw, print_report, summarise
from benchmarks.speed_tasks import AXES, BASES, Task, along, compare, parameters
from common.cli import Parser, number
from common.device import PRECISIONS, Device
from common.errors import RunError, run_command
from common.files import write_json
from storage.hub import find_base
from storage.weights import load_config
from training.options import ROOT

KINDS = ("train", "evaluate", "generate")


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also ends the measured process
    with TemporaryDirectory() as folder:
        prepare(opts, folder)
        failed = [measure_rounds(opts, name, tasks) for name, tasks in plans(opts).items()]
    return 1 if any(failed) else 0


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmarks.speed", description=__doc__)
    parser.add_argument(
        "--base", metavar="B", help="as train.py's (default: GPT-2 124M with random weights)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round on mini in the default precision of training, in two minutes",
    )
    parser.add_argument("--rounds", type=number(int, 1), help="default: 5")
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        help="timed steps after the warm-up (default: 3; --quick: 1; on CUDA 20)",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=tuple(PRECISIONS),
        metavar="P",
        help="default: fp32, bf16 unless the GPU emulates it, and on CUDA fp16; "
        "--quick: train.py's default",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*KINDS, *AXES),
        default=list(KINDS),
        metavar="PART",
        help=f"default: {' '.join(KINDS)}; also {' '.join(AXES)}",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="DIR",
        help="directory for figures and pictures",
    )
    opts = parser.parse_args(argv)
    set_defaults(opts)
    return opts


def set_defaults(opts: Namespace) -> None:
    """Set the missing options by the device and by `--quick`."""
    device = Device.pick(opts.device, train=True)
    opts.device = device.torch_device.type

    rounds = 5
    steps = 3
    warm_up = 2
    precisions = ["fp32", "bf16"]
    if opts.quick:
        opts.base = opts.base or "mini"
        rounds = 1
        steps = 1
    if device.is_cuda:
        steps = 20
        warm_up = 3
        native = device.precision  # fp16 if the GPU emulates bf16
        precisions = list(dict.fromkeys(("fp32", native, "fp16")))
    if opts.quick:
        precisions = [device.precision]

    opts.rounds = opts.rounds or rounds
    opts.steps = opts.steps or steps
    opts.warm_up = warm_up
    opts.precision = opts.precision or precisions


def prepare(opts: Namespace, folder: str) -> None:
    """Make bases of random weights in `folder`, find the base, and set the tasks' shared options.

    `opts.models` maps the number of parameters to the directories of these bases.
    """
    wanted = []
    if not opts.base:
        wanted.append("base")
    if "growth" in opts.only and opts.quick:
        wanted += list(BASES)[:2]
    elif "growth" in opts.only:
        wanted += list(BASES)

    opts.models = {}
    for name in dict.fromkeys(wanted):
        directory = made(folder, name)
        run_apart(Task(name, directory))
        opts.models[parameters(BASES[name])] = directory

    _, base = find_base(opts.base or made(folder, "base"))
    opts.config = load_config(base)
    opts.task = Task(
        "train",
        str(base),
        opts.device,
        warm_up=opts.warm_up,
        steps=opts.steps,
        block_size=min(Task.block_size, opts.config.n_positions),
    )


def made(folder: str, name: str) -> str:
    return str(Path(folder, f"{name}, random weights"))


def plans(opts: Namespace) -> dict[str, list[Task]]:
    """Return the tasks of a round, by the name of the file of figures."""
    found = {part: along(opts, part) for part in AXES if part in opts.only}
    compared = [kind for kind in KINDS if kind in opts.only]
    if compared == list(KINDS):
        found["speed"] = compare(opts)
    elif compared:
        found["-".join(compared)] = compare(opts)
    return found


def facts(opts: Namespace) -> dict[str, Any]:
    """Return the facts that the figures depend on, without the host's name."""
    base = Path(opts.base).name if opts.base else "GPT-2 124M, random weights"
    how = __doc__ or ""  # None under `python -OO`
    return {
        "base": base,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine_name(opts.device),
        "threads": torch.get_num_threads(),
        "load_average": [],  # over 1, 5 and 15 minutes, at the start of each round
        "versions": versions(),
        "rounds": opts.rounds,
        "steps": opts.steps,
        "how": " ".join(how.split()),
        "measurements": [],
        "failed": {},
    }


def machine_name(device: str) -> str:
    """Return the device and the processor, as a part of a file's name."""
    machine = f"{device}-{processor(device)}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", machine).strip("-")


def processor(device: str) -> str:
    """Return the GPU's name, or the CPU's name and its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        x86 = r"cpu family\s*: (\d+)\nmodel\s*: (\d+)\nmodel name\s*: (.+)"
        found = re.search(x86, cpuinfo.read_text())
        if found:
            family, model, name = found.groups()  # a virtual machine's name may hide the model
            return f"{os.cpu_count()}-{name}-family-{family}-model-{model}"
    return f"{os.cpu_count()}-{platform.machine()}"


def measure_rounds(opts: Namespace, what: str, tasks: list[Task]) -> bool:
    """Run every task once per round. Every other round runs in reverse order. Later rounds leave
    out a task that failed. Return whether a task failed.
    """
    results = facts(opts)
    prefix = "quick-" if opts.quick else ""
    path = opts.out / f"{prefix}{what}-{results['machine']}.json"

    for i in range(opts.rounds):
        load = os.getloadavg()
        results["load_average"].append(load)
        print(f"round {i + 1}: load average {load[0]:.2f} {load[1]:.2f} {load[2]:.2f}", flush=True)
        in_order = tasks if i % 2 == 0 else tasks[::-1]
        for task in in_order:
            if task.name not in results["failed"]:
                measure(task, i, results)
        results["summary"] = summarise(results["measurements"])
        write_json(path, results)

    print_report(results["summary"])
    print(f"\nsaved in {path}")
    draw(results, path.with_suffix(".png"))
    return bool(results["failed"])


def measure(task: Task, i: int, results: dict[str, Any]) -> None:
    """Run the task. Record and print the figures, or the reason of a failure."""
    try:
        figures = run_apart(task)
    except RunError as error:
        results["failed"][task.name] = str(error)
        print(f"error: {task.name}: {error}; left out from here on", file=sys.stderr, flush=True)
        return

    record = {
        "name": task.name,
        "contender": task.contender,
        "round": i,
        **asdict(task),
        **figures,
        "base": results["base"],  # without the path
    }
    results["measurements"].append(record)
    print(f"round {i + 1}: {task.name}: {figures['median']:.4g} s", flush=True)


def run_apart(task: Task) -> dict:
    """Measure a task in a separate process, or in several ranks. Return the figures. Raises
    RunError if a process fails.

    On Linux, a process inherits the peak memory of the parent, so this process must stay small.
    """
    command = [sys.executable, "-m"]
    if task.ranks:
        command += ["torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(task.ranks), "-m"]
    command += ["benchmarks.speed_worker", json.dumps(asdict(task))]

    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode == -signal.SIGKILL:
        raise RunError("its process was killed (out of memory?)")
    if ended.returncode:
        raise RunError(reason(ended))
    return json.loads(ended.stdout.splitlines()[-1])


def reason(ended: subprocess.CompletedProcess[str]) -> str:
    """Return why a process failed: the line of the error, or the last line of output."""
    lines = [f"exit status {ended.returncode}", *re.findall(r".*\w.*", ended.stderr)]
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")  # torchrun writes more lines
    return lines[-1]


if __name__ == "__main__":
    run_command(main)
