"""Part of `verify_gpu.py`: compare the time, memory and launches of a step with PEFT's step."""

from argparse import Namespace
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from benchmarks.parity_report import Report
from benchmarks.speed import run_apart
from benchmarks.speed_tasks import Task, sides
from benchmarks.speed_worker import measure
from common.errors import RunError


def speed(opts: Namespace, report: Report) -> None:
    """Time a step of GPT-2 124M with random weights. Each contender runs in a separate process. A
    dry run times the tiny base in this process.

    All ratios are relative to this project's default step, the first row of each method.
    """
    run = measure if opts.dry_run else run_apart
    if opts.device.is_cuda:
        torch.cuda.empty_cache()
    with TemporaryDirectory() as folder:
        if not opts.dry_run:
            run(Task("base", folder))
        for method in ("lora", "full"):
            first: dict = {}
            for task in timed_tasks(opts, folder, method):
                try:
                    found = run(task)
                except RunError as error:
                    report.facts[f"{task.contender}, failed"] = str(error)
                    if task.side == "ours":
                        report.fail(task.contender, str(error))
                    continue
                first = first or found
                report.facts[task.contender] = figures(opts, found, first)


def timed_tasks(opts: Namespace, folder: str, method: str) -> list[Task]:
    """Return the tasks of all sides, on the base in `folder`, or on the tiny base of a dry run."""
    task = Task(
        "train",
        str(opts.base) if opts.dry_run else folder,
        opts.device.torch_device.type,
        method=method,
        precision=opts.low,
        batch_size=opts.batch,
        block_size=opts.block,
        warm_up=1 if opts.dry_run else 5,
        steps=1 if opts.dry_run else 20,
        profile=True,
    )
    if opts.dry_run:
        return sides(task)[:2]
    if not opts.device.is_cuda:
        return sides(task)
    tasks = []
    for compiled in (False, True):
        ours, *theirs = sides(replace(task, compile=compiled))
        tasks += [ours, replace(ours, graph=True), *theirs]
    return tasks


def graph_speed(facts: dict) -> float | None:
    """Return the speed-up of a LoRA step by a CUDA graph, if both steps were timed."""
    names = [name for name in facts if name.startswith("this project, LoRA")]
    with_graph = [name for name in names if name.endswith(", graph") and "compiled" not in name]
    if not with_graph:
        return None
    without = with_graph[0].removesuffix(", graph")
    return facts[without]["ms a step"] / facts[with_graph[0]]["ms a step"]


def figures(opts: Namespace, found: dict, first: dict) -> dict[str, object]:
    """Return the figures for one row of the report's table."""
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
