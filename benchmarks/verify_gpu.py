"""Verify this project on a GPU: `python -m benchmarks.verify_gpu` (`make verify-gpu`).

It checks what the tests cannot, which `make test ARGS="--device cuda"` runs on the GPU: that a run
learns what PEFT's does under every option of precision, memory and compilation, that no step waits
for the GPU, and how fast and large a step is beside PEFT's. It writes gpu-report.md and
gpu-report.json, and exits with 1 when a check fails. `--dry-run` runs the same script, small, on a
CPU: what it says of a GPU is nothing, but a run that learns nothing fails there, too.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.gpu_learning import learning, no_waiting
from benchmarks.gpu_machine import describe
from benchmarks.gpu_speed import speed
from benchmarks.parity_report import Report
from common.cli import Parser, print_table
from common.device import Device, tune_process, use_full_fp32
from common.errors import UserError, run_command
from common.files import atomic_path, write_json
from storage.hub import MINI
from training.options import ROOT

Part = Callable[[Namespace, Report], None]
PARTS: dict[str, Part] = {
    "describe": describe,
    "learning": learning,
    "no-waiting": no_waiting,
    "speed": speed,
}
SUMMARY = ("name", "result", "checks made", "seconds")  # of a part, in the report's first table


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    tune_process()

    parts: list[dict[str, Any]] = []
    for name in opts.only:
        parts.append(run_part(name, opts))
        write(parts, opts)  # at each: a crash leaves what was found

    failed = [part["name"] for part in parts if part["result"] == "failed"]
    print(f"\nfailed: {', '.join(failed) or 'nothing'}; saved in {opts.out / 'gpu-report.md'}")
    return 1 if failed else 0


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmarks.verify_gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="small, on a CPU")
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
    opts.base = MINI
    if opts.dry_run:
        opts.device = Device.pick("cpu", "fp32")
        opts.low = "bf16"
        opts.steps = 6
        opts.batch = 2
        opts.block = 32
        return opts

    opts.device = Device.pick("auto", "fp32")
    if opts.device.torch_device.type == "cpu":
        raise UserError("torch finds no GPU; --dry-run tries the script on a CPU")
    native = Device.pick().precision
    opts.low = "bf16" if native == "fp32" else native
    opts.steps = 20
    opts.batch = 16
    opts.block = 128
    return opts


def run_part(name: str, opts: Namespace) -> dict[str, Any]:
    """Run a part; what it raises is its failure, and the next part begins."""
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
    write_json(opts.out / "gpu-report.json", {"title": title, "parts": parts})
    with (
        atomic_path(opts.out / "gpu-report.md") as temporary,
        temporary.open("w", encoding="utf-8") as file,
        redirect_stdout(file),
    ):
        print(f"# GPU report: {title}\n")
        print_table(SUMMARY, [tuple(part[key] for key in SUMMARY) for part in parts])
        for part in parts:
            print_part(part)


def print_part(part: dict[str, Any]) -> None:
    """Print what was found: facts one by one, checks and measured figures as tables."""
    print(f"\n## {part['name']}\n")
    tables: dict[tuple, list[tuple]] = {}  # rows of figures, by their columns
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
