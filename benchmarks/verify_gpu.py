"""Verify this project on a GPU: `python -m benchmarks.verify_gpu` (`make verify-gpu`).

`make test ARGS="--device cuda"` does not make these checks. Every kind of run must give the numbers
of the CPU in fp32, the CPU must give the numbers of PEFT, and no step may wait for the GPU. Speed
and memory of a step are compared with PEFT's step. The command writes gpu-report.md and
gpu-report.json, recommends a default of --cuda-graph for this machine, and exits with 1 if a check
fails. `--dry-run` runs the same checks on a CPU with a tiny model.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu_checks import GRAPH, checks, make_inputs
from benchmarks.gpu_machine import describe
from benchmarks.gpu_speed import graph_speed, speed
from benchmarks.parity_report import Report
from common.cli import Parser, print_table
from common.device import Device, tune_process, use_full_fp32
from common.errors import UserError, run_command
from common.files import atomic_path, write_json
from model.gpt2 import GPT2Config
from training.options import ROOT

Part = Callable[[Namespace, Report], None]
PARTS: dict[str, Part] = {"machine": describe, "checks": checks, "speed": speed}
SUMMARY = ("name", "result", "checks made", "seconds")  # columns of the first table


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    tune_process()

    parts: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        make_inputs(opts, Path(folder))
        for name in opts.only:
            parts.append(run_part(name, opts))
            write(parts, opts)  # after each part, so that a crash loses nothing

    failed = [part["name"] for part in parts if part["result"] == "failed"]
    print(f"\nfailed: {', '.join(failed) or 'nothing'}; saved in {opts.out / 'gpu-report.md'}")
    print(graph_default(parts))
    return 1 if failed else 0


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmarks.verify_gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="DIR")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(PARTS),
        default=list(PARTS),
        metavar="PART",
        help=f"default: {' '.join(PARTS)}",
    )
    opts = parser.parse_args(argv)
    if opts.dry_run:
        torch.set_num_threads(1)  # a larger thread pool breaks when two ranks are forked
        opts.device = Device.pick("cpu", "fp32")
        opts.low = "bf16"
        opts.batch = 8
        opts.block = 16
        opts.config = GPT2Config(vocab_size=317, n_positions=32, n_embd=32, n_layer=2, n_head=2)
        return opts

    opts.device = Device.pick("auto", "fp32")
    if opts.device.torch_device.type == "cpu":
        raise UserError("torch finds no GPU; --dry-run tries the script on a CPU")
    native = Device.pick().precision
    opts.low = "bf16" if native == "fp32" else native
    opts.batch = 16
    opts.block = 128
    opts.config = GPT2Config(vocab_size=5003, n_positions=256, n_embd=256, n_layer=4, n_head=4)
    return opts


def graph_default(parts: list[dict[str, Any]]) -> str:
    """Return whether --cuda-graph should be the default on this machine, and why."""
    made = [check for part in parts for check in part["checks"] if GRAPH in check["name"]]
    broken = [check["name"] for check in made if not check["ok"]]
    if broken:
        return f"{GRAPH}: leave it off, because a check failed: {broken[0]}"
    if not made:
        return f"{GRAPH}: leave it off, because no check has run it here"
    gain = graph_speed({name: fact for part in parts for name, fact in part["facts"].items()})
    if gain is None:
        return f"{GRAPH}: it computes the same numbers here; its speed was not measured"
    use = "turn it on" if gain > 1 else "leave it off"
    return f"{GRAPH}: {use}; it computes the same numbers here, {gain:.2f} times as fast"


def run_part(name: str, opts: Namespace) -> dict[str, Any]:
    """Run a part. An exception fails only this part, and the next part still runs."""
    use_full_fp32()
    report = Report()
    began = time.perf_counter()
    with report.trying(name):
        PARTS[name](opts, report)
    seconds = time.perf_counter() - began

    broken = report.broken()
    result = "failed" if broken else "ok"
    print(f"{name}: {result} {'; '.join(broken)}", flush=True)
    return {
        "name": name,
        "result": result,
        "checks made": str(len(report.checks)),
        "seconds": f"{seconds:.1f}",
        "facts": report.facts,
        "checks": report.checks,
    }


def write(parts: list[dict[str, Any]], opts: Namespace) -> None:
    """Write gpu-report.json and gpu-report.md."""
    title = "dry run on a CPU" if opts.dry_run else opts.device.name
    verdict = graph_default(parts)
    write_json(
        opts.out / "gpu-report.json", {"title": title, "cuda_graph": verdict, "parts": parts}
    )
    with (
        atomic_path(opts.out / "gpu-report.md") as temporary,
        temporary.open("w", encoding="utf-8") as file,
        redirect_stdout(file),
    ):
        print(f"# GPU report: {title}\n")
        print_table(SUMMARY, [tuple(part[key] for key in SUMMARY) for part in parts])
        print(f"\n{verdict}")
        for part in parts:
            print_part(part)


def print_part(part: dict[str, Any]) -> None:
    """Print the results of a part: facts one by one, checks and figures as tables."""
    print(f"\n## {part['name']}\n")
    tables: dict[tuple, list[tuple]] = {}  # columns -> rows of figures
    for name, fact in part["facts"].items():
        if isinstance(fact, dict):
            tables.setdefault(tuple(fact), []).append((name, *map(str, fact.values())))
        else:
            print(f"- {name}: {fact}")

    if part["checks"]:
        print()
        rows = []
        for check in part["checks"]:
            value, allowed = f"{check['value']:.2g}", f"{check['allowed']:.2g}"
            rows.append((check["name"], value, allowed, "ok" if check["ok"] else "FAILED"))
        print_table(("check", "value", "allowed", ""), rows)
    for columns, rows in tables.items():
        print()
        print_table(("", *columns), rows)


if __name__ == "__main__":
    run_command(main)
