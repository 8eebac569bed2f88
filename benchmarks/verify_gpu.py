"""Verify this project on a GPU: `python -m benchmarks.verify_gpu` (`make verify-gpu`).

It writes gpu-report.md and gpu-report.json: what the machine is, what was checked, and how fast a
step is beside PEFT's. It exits with 1 when a check fails; a part that cannot run here says why.
`--dry-run` runs the same script, small, on a CPU, and shows no more than that the script works.
"""

import os
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

from benchmarks.gpu_parts import PARTS, Skip
from benchmarks.parity_report import Report
from common.cli import Parser, print_table
from common.device import Device, tune_process
from common.errors import UserError, first_line, run_command
from common.files import atomic_path, write_json
from training.options import ROOT


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    tune_process()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic matmuls need
    parts = []
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
    opts.device = Device.pick("cpu" if opts.dry_run else "cuda", "fp32")
    opts.low = "bf16" if opts.dry_run else Device.pick("cuda").precision  # what is native
    opts.steps, opts.batch, opts.block = (3, 2, 32) if opts.dry_run else (20, 16, 128)
    return opts


def run_part(name: str, opts: Namespace) -> dict:
    """Run a part; what it raises is its failure, and the next part begins."""
    report, began, result, reasons = Report(), time.perf_counter(), "ok", []
    opts.device.set_tf32(False)  # what an image, or a part before this one, may have switched on
    torch.use_deterministic_algorithms(False)
    if opts.device.is_cuda:
        torch.cuda.set_sync_debug_mode("default")
    try:
        PARTS[name](opts, report)
    except Skip as skip:
        result, reasons = "skipped", [str(skip)]
    except Exception as error:
        traceback.print_exc()
        result, reasons = "failed", [f"{type(error).__name__}: {first_line(error)}"]
    result, reasons = "failed" if report.broken() else result, [*report.broken(), *reasons]
    print(f"{name}: {result} {'; '.join(reasons)}", flush=True)
    return {
        "name": name,
        "result": result,
        "why": "; ".join(reasons),
        "facts": report.facts,
        "seconds": f"{time.perf_counter() - began:.1f}",
        "checks": report.checks,
    }


def write(parts: list[dict], opts: Namespace) -> None:
    title = "dry run on a CPU" if opts.dry_run else opts.device.name
    write_json(opts.out / "gpu-report.json", {"title": title, "parts": parts})
    with (
        atomic_path(opts.out / "gpu-report.md") as temporary,
        temporary.open("w", encoding="utf-8") as file,
        redirect_stdout(file),
    ):
        print(f"# GPU report: {title}\n")
        print_table(
            ("name", "result", "why", "seconds"),
            [[part[key] for key in ("name", "result", "why", "seconds")] for part in parts],
        )
        for part in parts:
            measured = {k: v for k, v in part["facts"].items() if isinstance(v, dict)}
            print(f"\n## {part['name']}\n")
            print("".join(f"- {k}: {v}\n" for k, v in part["facts"].items() if k not in measured))
            if part["checks"]:
                print_table(
                    ("check", "value", "allowed", "ok"),
                    [
                        (c["name"], f"{c['value']:.2g}", f"{c['allowed']:.2g}", str(c["ok"]))
                        for c in part["checks"]
                    ],
                )
            if measured:
                print_table(
                    ("", *next(iter(measured.values()))),
                    [(name, *map(str, figures.values())) for name, figures in measured.items()],
                )


if __name__ == "__main__":
    run_command(main)
