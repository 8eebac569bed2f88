"""Parts of `verify_gpu.py` that compare with PEFT: step by step, in what is learned, in speed.

A part takes the options and adds to a report, or says why it cannot run here.
"""

import os
from argparse import Namespace
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from benchmarks import ours, parity, peft_loop
from benchmarks.gpu_training import Skip, arguments
from benchmarks.parity_report import Report
from benchmarks.parity_runs import train_here, train_there
from benchmarks.speed import run_apart
from benchmarks.speed_tasks import Task, sides
from common.errors import RunError, UserError
from model.hub import find_base

VALIDATION = 2e-2  # relative: adapters trained with dropouts drawn anew


def peft_parity(opts: Namespace, report: Report) -> None:
    """Run benchmarks.parity on the device, in fp32 and in the native low precision."""
    argv = ["--base", str(opts.base), "--device", opts.device.torch_device.type]
    if opts.dry_run:
        argv += ["--exact-only", "--steps", "2", "--block-size", "32"]
    found = Report()  # of its own: parity's facts are not for this report
    parity.compare(parity.parse_args(argv), found)
    report.checks += found.checks


def validation(opts: Namespace, report: Report) -> None:
    """Compare validation losses of adapters trained on gpt2, each with dropouts of its own."""
    base = opts.base
    more: list[object] = []
    if not opts.dry_run:
        more = ["--max-steps", 10**6]  # all of the three epochs
        try:
            _, base = find_base("gpt2")
        except UserError as error:
            raise Skip(str(error)) from error
    args = ours.options(*arguments(opts, "lora", "--base", base, *more))

    _, part = ours.data(args)
    tokens = part.tokens[:1000] if opts.dry_run else part.tokens
    found = {}
    for precision in ("fp32", opts.low):
        args = replace(args, precision=precision)
        device = replace(opts.device, precision=precision)
        run, trainer = train_here(args, draws=0)
        scores = ours.evaluate(run.model, tokens, base, device, args.block_size)
        found[f"ours, {precision}"] = scores.loss

    there = train_there(args, trainer, draws=0).model
    with device.autocast():
        found["PEFT, autocast"] = peft_loop.evaluate(there, tokens, args.block_size)
    for name, loss in found.items():
        report.facts[name] = f"validation loss {loss:.4f}"
        difference = abs(loss / found["ours, fp32"] - 1)
        report.check(f"{name}: from ours in fp32", difference, VALIDATION)


def speed(opts: Namespace, report: Report) -> None:
    """Time a LoRA step of GPT-2 124M, random weights, each contender in a process of its own."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # as users have it
    torch.cuda.empty_cache()
    with TemporaryDirectory() as folder:
        for task in timed_tasks(opts, folder):
            try:
                found = run_apart(task)
            except RunError as error:
                if task.side == "ours":
                    raise
                report.facts[f"{task.contender}, failed"] = str(error)
            else:
                report.facts[task.contender] = figures(opts, found)


def timed_tasks(opts: Namespace, folder: str) -> list[Task]:
    """Return all sides' tasks, on a base that is made in `folder`; a dry run has its own base."""
    task = Task(
        "train",
        str(opts.base) if opts.dry_run else folder,
        opts.device.torch_device.type,
        precision=opts.low,
        batch_size=opts.batch,
        block_size=opts.block,
        warm_up=5,
        steps=opts.steps,
        profile=True,
        matmuls=not opts.dry_run,
    )
    if opts.dry_run:
        return sides(task)
    run_apart(Task("base", folder))
    return [*sides(task), *sides(replace(task, compile=True))]


def figures(opts: Namespace, found: dict) -> dict[str, object]:
    """Return the figures of a row of the report's table."""
    seconds = found["median"]
    share: object = "-"
    if "matmul_seconds" in found:
        share = round(found["matmul_seconds"] / seconds, 2)
    return {
        "ms a step": round(1e3 * seconds, 2),
        "tokens/s": round(opts.batch * opts.block / seconds),
        "GPU busy, ms": round(found["busy_ms"], 2),
        "launches": found["launches"],
        "peak MB": round(found["peak_mb"]),
        "reserved MB": round(found["reserved_mb"]),
        "matmuls' share": share,
    }
