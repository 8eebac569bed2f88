"""Measure time and memory: this project against PEFT and transformers, side by side.

`python -m benchmarks.speed` runs every contender in a process of its own, one after the other,
round after round, so that a machine that slows down slows all of them; ratios are taken within a
round. The base is a GPT-2 124M of random weights, made on the spot. All sides have the same batch,
at every step, and the same dropouts, optimizer (fused AdamW) and clipping. The others run as they
come: stock activation and attention, cross-entropy over their logits, mixed precision by autocast,
and for LoRA, evaluation and generation also with the frozen weights themselves in low precision;
our side keeps freed memory as its commands do (`tune_process`). `--only gpt2-xl` is one round of
LoRA on a random gpt2-xl, 4 windows a step; `--only growth` is LoRA against batch, block and rank;
`--only scaling` is one batch shared by the ranks that torchrun starts, all on this machine; its
bytes are those that a rank's step hands to all_reduce.
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
from dataclasses import asdict, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.parity_report import versions
from benchmarks.speed_report import draw, print_report, summarise
from benchmarks.speed_worker import Task
from common.cli import Parser, number
from common.device import PRECISIONS, Device
from common.errors import RunError, run_command
from common.files import write_json
from model.hub import find_base
from model.weights import load_config
from training.options import ROOT

KINDS, LARGE = ("train", "evaluate", "generate"), "gpt2-xl"
AXES = {
    "growth": {
        "batch_size": (4, 8, 16, 32, 64),
        "block_size": (64, 128, 256, 512, 1024),
        "r": (1, 4, 16, 64),
    },
    "scaling": {"ranks": (1, 2, 4)},
}
SMALL_BATCH = 4  # while the block grows


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the process measured as well
    with TemporaryDirectory() as folder:
        if not opts.base:
            run_apart(Task("base", folder))
        base = find_base(opts.base or folder)[1]
        opts.config = load_config(base)
        opts.task = Task(
            "train",
            str(base),
            opts.device,
            warm_up=opts.warm_up,
            steps=opts.steps,
            block_size=min(Task.block_size, opts.config.n_positions),
        )
        plans = {part: along(opts, part) for part in AXES if part in opts.only}
        if compared := [kind for kind in KINDS if kind in opts.only]:
            plans["speed" if compared == list(KINDS) else "-".join(compared)] = compare(opts)
        failed = [measure_rounds(opts, name, tasks) for name, tasks in plans.items()]
        if LARGE in opts.only:
            opts.base, opts.rounds = str(Path(folder, f"{LARGE}, random weights")), 1
            failed.append(measure_rounds(opts, LARGE, large(opts)))
    return 1 if any(failed) else 0


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmarks.speed", description=__doc__)
    parser.add_argument(
        "--base", metavar="B", help="as train.py's (default: GPT-2 124M with random weights)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round on mini in training's default precision, in two minutes",
    )
    parser.add_argument("--rounds", type=number(int, 1), help="default: 5")
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        help="timed after the warm-up (default: 3; --quick: 1; on CUDA 20)",
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
        choices=(*KINDS, *AXES, LARGE),
        default=list(KINDS),
        metavar="PART",
        help=f"default: {' '.join(KINDS)}; also {' '.join((*AXES, LARGE))}",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="DIR",
        help="where the figures and pictures go",
    )
    opts = parser.parse_args(argv)
    device = Device.pick(opts.device, train=True)
    opts.device, cuda = device.torch_device.type, device.is_cuda
    native = device.precision if cuda else "bf16"  # fp16 where bf16 would be emulated
    opts.base = opts.base or ("mini" if opts.quick else None)
    opts.rounds = opts.rounds or (1 if opts.quick else 5)
    opts.steps = opts.steps or (20 if cuda else 1 if opts.quick else 3)
    opts.warm_up = 3 if cuda else 2
    every = list(dict.fromkeys(("fp32", native, *["fp16"] * cuda)))
    opts.precision = opts.precision or ([device.precision] if opts.quick else every)
    return opts


def facts(opts: Namespace) -> dict:
    """Return what the figures depend on, and nothing that names a machine."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    kind = (
        torch.cuda.get_device_name()
        if opts.device == "cuda"
        else (f"{os.cpu_count()}-{model[1] if model else platform.machine()}")
    )
    return {
        "base": Path(opts.base).name if opts.base else "GPT-2 124M, random weights",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": re.sub(r"[^A-Za-z0-9.]+", "-", f"{opts.device}-{kind}").strip("-"),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "versions": versions(),
        "rounds": opts.rounds,
        "steps": opts.steps,
        "how": " ".join(__doc__.split()),
        "measurements": [],
        "failed": {},
    }


def compare(opts: Namespace) -> list[Task]:
    """Return the tasks of one round, all sides."""
    tasks, cuda = [], opts.device == "cuda"
    for precision in opts.precision:
        task = replace(opts.task, precision=precision)
        for method, compiled in product(("lora", "full"), (False, True)[: 1 + cuda]):
            tasks += sides(replace(task, method=method, compile=compiled, matmuls=True))
        tasks += sides(replace(task, kind="evaluate"))
        tasks += sides(replace(task, kind="generate", steps=1, warm_up=0))  # it warms up itself
    return [task for task in tasks if task.kind in opts.only]


def sides(task: Task) -> list[Task]:
    """Return ours and theirs; theirs also with frozen weights in low precision, where it is low."""
    theirs = replace(task, side="theirs", matmuls=False)
    low = task.precision != "fp32" and task.method == "lora" and not task.compile
    return [task, theirs, *[replace(theirs, weights="low")] * low]


def along(opts: Namespace, part: str) -> list[Task]:
    """Return training tasks at each size that the base allows: for growth our LoRA and PEFT's, in
    bf16 if that is among the precisions; for scaling both of our methods, in the first precision.
    """
    tasks, most = [], {"block_size": opts.config.n_positions, "r": opts.config.n_embd}
    most |= {"ranks": torch.cuda.device_count()} if opts.device == "cuda" else {}
    bf16 = part == "growth" and "bf16" in opts.precision
    others = {"side": "theirs"} if part == "growth" else {"method": "full"}
    for axis, sizes in AXES[part].items():
        task = replace(
            opts.task,
            axis=axis,
            precision="bf16" if bf16 else opts.precision[0],
            batch_size=SMALL_BATCH if axis == "block_size" else Task.batch_size,
        )
        for size in (size for size in sizes if size <= most.get(axis, size)):
            tasks += [replace(task, **{axis: size}), replace(task, **{axis: size}, **others)]
    return tasks


def large(opts: Namespace) -> list[Task]:
    """Return tasks of LoRA on a gpt2-xl of random weights, in fp16 on the disk."""
    run_apart(Task(LARGE, opts.base))
    low = next((p for p in opts.precision if p != "fp32"), "fp32")
    return sides(replace(opts.task, base=opts.base, precision=low, batch_size=SMALL_BATCH))


def measure_rounds(opts: Namespace, what: str, tasks: list[Task]) -> bool:
    """Run every task once a round, every other round in reverse. A task that fails is left out
    from then on; returns whether one did.
    """
    results = facts(opts)
    path = opts.out / f"{'quick-' * opts.quick}{what}-{results['machine']}.json"
    for i in range(opts.rounds):
        for task in tasks[:: -1 if i % 2 else 1]:
            if task.name not in results["failed"]:
                measure(task, i, results)
        results["summary"] = summarise(results["measurements"])
        write_json(path, results)
    print_report(results["summary"])
    print(f"\nsaved in {path}")
    draw(results, path.with_suffix(".png"))
    return bool(results["failed"])


def measure(task: Task, i: int, results: dict) -> None:
    """Run the task, keep and print its figures; of a failure the reason."""
    try:
        figures = run_apart(task)
    except RunError as error:
        results["failed"][task.name] = str(error)
        print(f"error: {task.name}: {error}; left out from here on", file=sys.stderr, flush=True)
        return
    results["measurements"].append(
        {
            "name": task.name,
            "contender": task.contender,
            "round": i,
            **asdict(task),
            **figures,
            "base": results["base"],
        }
    )  # not its path
    print(f"round {i + 1}: {task.name}: {figures['median']:.4g} s", flush=True)


def run_apart(task: Task) -> dict:
    """Return the figures of a task measured in a process of its own, or in its ranks. Raises
    RunError if that fails.

    Linux starts a process's peak memory at that of the one which starts it: stay small here.
    """
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(task.ranks), "-m"]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            *(torchrun if task.ranks else []),
            "benchmarks.speed_worker",
            json.dumps(asdict(task)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if ended.returncode == -signal.SIGKILL:
        raise RunError("its process was killed (out of memory?)")
    if ended.returncode:
        lines = [f"exit status {ended.returncode}", *re.findall(r".*\w.*", ended.stderr)]
        said = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise RunError(said.removeprefix("error: "))  # torchrun's own lines come after it
    return json.loads(ended.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_command(main)
