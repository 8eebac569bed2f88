"""A part of `verify_gpu.py`: time, memory and launches of a step beside PEFT's."""

from argparse import Namespace
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from benchmarks.parity_report import Report
from benchmarks.speed import run_apart
from benchmarks.speed_tasks import Task, sides
from common.errors import RunError


def speed(opts: Namespace, report: Report) -> None:
    """Time a step of GPT-2 124M, random weights, each contender in a process of its own.

    Ratios are to this project's step as users have it, which comes first of each method.
    """
    if opts.device.is_cuda:
        torch.cuda.empty_cache()
    with TemporaryDirectory() as folder:
        if not opts.dry_run:
            run_apart(Task("base", folder))
        for method in ("lora", "full"):
            first: dict = {}
            for task in timed_tasks(opts, folder, method):
                try:
                    found = run_apart(task)
                except RunError as error:
                    report.facts[f"{task.contender}, failed"] = str(error)
                    if task.side == "ours":
                        report.fail(task.contender, str(error))
                    continue
                first = first or found
                report.facts[task.contender] = figures(opts, found, first)


def timed_tasks(opts: Namespace, folder: str, method: str) -> list[Task]:
    """Return all sides' tasks, on the base in `folder`; a dry run has its own base."""
    task = Task(
        "train",
        str(opts.base) if opts.dry_run else folder,
        opts.device.torch_device.type,
        method=method,
        precision=opts.low,
        batch_size=opts.batch,
        block_size=opts.block,
        warm_up=5,
        steps=opts.steps,
        profile=True,
    )
    if opts.dry_run or not opts.device.is_cuda:
        return sides(task)
    tasks = []
    for compiled in (False, True):
        ours, *theirs = sides(replace(task, compile=compiled))
        tasks += [ours, replace(ours, graph=True), *theirs]
    return tasks


def figures(opts: Namespace, found: dict, first: dict) -> dict[str, object]:
    """Return the figures of a row of the report's table."""
    seconds = found["median"]
    share: object = "-"
    if "matmuls_share" in found:
        share = round(found["matmuls_share"], 2)
    return {
        "ms a step": round(1e3 * seconds, 2),
        "time / ours": round(seconds / first["median"], 2),
        "tokens/s": round(opts.batch * opts.block / seconds),
        "GPU busy, ms": round(found["busy_ms"], 2),
        "launches": found["launches"],
        "peak MB": round(found["peak_mb"]),
        "peak / ours": round(found["peak_mb"] / first["peak_mb"], 2),
        "reserved MB": round(found["reserved_mb"]),
        "matmuls' share": share,
    }
