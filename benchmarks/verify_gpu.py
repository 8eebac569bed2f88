"""Verify this project on a GPU: `python -m benchmarks.verify_gpu` (`make verify-gpu`).

It writes gpu-report.md and gpu-report.json: what the machine is, what was checked, and how fast a
step is beside PEFT's. It exits with 1 when a check fails; a part that cannot run here says why.
`--dry-run` runs the same script, small, on a CPU, and shows no more than that the script works.
"""

import os
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_operations import describe, operations, text
from benchmarks.gpu_peft import peft_parity, speed, validation
from benchmarks.gpu_training import Skip, empty_share, no_waiting, options, resume, two_ranks
from benchmarks.parity_report import Report
from common.cli import Parser, print_table
from common.device import Device, tune_process
from common.errors import UserError, first_line, run_command
from common.files import atomic_path, write_json
from model.hub import MINI
from training.options import ROOT

Part = Callable[[Namespace, Report], None]
PARTS: dict[str, Part] = {
    "describe": describe,
    "operations": operations,
    "options": options,
    "no-waiting": no_waiting,
    "resume": resume,
    "empty-share": empty_share,
    "two-ranks": two_ranks,
    "text": text,
    "peft-parity": peft_parity,
    "validation": validation,
    "speed": speed,
}
SUMMARY = ("name", "result", "why", "seconds")  # of a part, in the report's first table


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    tune_process()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic matmuls need

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
    if not opts.dry_run and not torch.cuda.is_available():
        raise UserError("torch finds no GPU; --dry-run tries the script on a CPU")

    opts.only = [part for part in PARTS if part in opts.only]  # speed undoes what resume needs
    opts.base = MINI
    if opts.dry_run:
        opts.device = Device.pick("cpu", "fp32")
        opts.low = "bf16"
        opts.steps = 3
        opts.batch = 2
        opts.block = 32
    else:
        opts.device = Device.pick("cuda", "fp32")
        opts.low = Device.pick("cuda").precision  # what is native
        opts.steps = 20
        opts.batch = 16
        opts.block = 128
    return opts


def run_part(name: str, opts: Namespace) -> dict[str, Any]:
    """Run a part; what it raises is its failure, and the next part begins."""
    opts.device.set_tf32(False)  # what an image, or a part before this one, may have switched on
    torch.use_deterministic_algorithms(False)
    if opts.device.is_cuda:
        torch.cuda.set_sync_debug_mode("default")

    report = Report()
    result = "ok"
    reasons = []
    began = time.perf_counter()
    try:
        PARTS[name](opts, report)
    except Skip as skip:
        result = "skipped"
        reasons = [str(skip)]
    except Exception as error:
        traceback.print_exc()
        result = "failed"
        reasons = [f"{type(error).__name__}: {first_line(error)}"]
    seconds = time.perf_counter() - began

    broken = report.broken()
    if broken:
        result = "failed"
    why = "; ".join([*broken, *reasons])
    print(f"{name}: {result} {why}", flush=True)
    return {
        "name": name,
        "result": result,
        "why": why,
        "facts": report.facts,
        "seconds": f"{seconds:.1f}",
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
    facts = part["facts"]
    measured = {name: fact for name, fact in facts.items() if isinstance(fact, dict)}
    items = [f"- {name}: {fact}\n" for name, fact in facts.items() if name not in measured]
    print(f"\n## {part['name']}\n")
    print("".join(items))

    if part["checks"]:
        rows = []
        for check in part["checks"]:
            value, allowed = f"{check['value']:.2g}", f"{check['allowed']:.2g}"
            rows.append((check["name"], value, allowed, str(check["ok"])))
        print_table(("check", "value", "allowed", "ok"), rows)

    if measured:
        columns = next(iter(measured.values()))
        rows = [(name, *map(str, figures.values())) for name, figures in measured.items()]
        print_table(("", *columns), rows)


if __name__ == "__main__":
    run_command(main)
