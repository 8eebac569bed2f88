"""Parts of `verify_gpu.py`: training under every option, without waiting, after a death, by ranks.

A part takes the options and adds to a report, or says why it cannot run here.
"""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.parity_report import Report, relative
from train import Trainer
from training.options import ROOT
from training.ranks import Ranks
from training.report import read_metrics

# Rounding decides the sign of Adam's first steps where a gradient is near 0, in whatever precision.
LOSS = {"fp32": 1e-4, "TF32": 5e-2, "bf16": 5e-2, "fp16": 5e-2}  # relative errors that may be
NO_DROPOUT = {
    "lora": ("--base-dropout", "0", "--lora-dropout", "0"),
    "full": ("--base-dropout", "0"),
}
LOW = ("--precision", "low")
COMPILE = ("--compile",)
SMALL_PART = ("--val-fraction", "0.02")  # to validate on: it takes most of a short run
CASES = {  # what changes a step's computation; each is compared with fp32 as it is
    "checkpointing": ("--gradient-checkpointing",),
    "3 parts": ("--grad-accum", "3"),
    "TF32": ("--allow-tf32",),
    "compiled": COMPILE,
    "low": LOW,
    "low, compiled": (*LOW, *COMPILE),
    "low, all": (*LOW, *COMPILE, "--gradient-checkpointing", "--grad-accum", "3"),
}


class Skip(Exception):
    """Say why a part cannot run here."""


def arguments(opts: Namespace, method: str, *more: object) -> list[str]:
    """Return `train.py`'s for a short run; "low" in `more` is the native low precision."""
    named = [opts.low if option == "low" else option for option in more]
    return ours.command_line(
        method,
        *named,
        base=opts.base,
        device=opts.device.torch_device.type,
        precision="fp32",
        max_steps=opts.steps,
        batch_size=opts.batch,
        block_size=opts.block,
    )


def make_trainer(opts: Namespace, method: str, *more: object) -> Trainer:
    torch.compiler.reset()
    return ours.make_trainer(ours.options(*arguments(opts, method, *more)))


def losses(opts: Namespace, method: str, *more: object) -> list[float]:
    """Return the loss of each step on one batch, without dropout."""
    trainer = make_trainer(opts, method, *NO_DROPOUT[method], *more)
    batch = next(trainer.batches(0))
    return [ours.step(trainer, batch) for _ in range(opts.steps)]


def options(opts: Namespace, report: Report) -> None:
    """Train under every option that changes the computation, beside fp32 as it is."""
    for method in ("lora", "full"):
        reference = losses(opts, method)
        report.check(f"{method}: the loss falls", reference[-1] - reference[0], 0)
        for name, more in CASES.items():
            if opts.dry_run and "--compile" in more:
                report.facts["compiled"] = "left out of a dry run: minutes of compilation"
                continue
            precision = opts.low if "low" in more else name
            report.check(
                f"{method}, {name.replace('low', opts.low)}: loss of every step",
                relative(losses(opts, method, *more), reference),
                LOSS.get(precision, LOSS["fp32"]),
            )


def no_waiting(opts: Namespace, report: Report) -> None:
    """Check that a step never waits for the GPU: PyTorch raises where one would."""
    if not opts.device.is_cuda:
        raise Skip("on a CPU there is nothing to wait for")
    conversations = ROOT / "data" / "instructions.jsonl"
    runs: tuple[tuple[object, ...], ...] = (
        ("fp32",),
        (opts.low,),
        (opts.low, "--use-dora"),
        (opts.low, "--target-modules", "c_attn.q", "c_attn.v"),
        (opts.low, "--data", conversations),
    )
    for run in runs:
        trainer = make_trainer(opts, "lora", "--precision", *run)
        batches = trainer.batches(0)
        for mode in ("default", "default", "error"):  # the first steps make what later ones keep
            torch.cuda.set_sync_debug_mode(mode)
            trainer.step(next(batches))
        torch.cuda.set_sync_debug_mode("default")
        report.facts[" ".join(map(str, run))] = "a step does not wait"


def resume(opts: Namespace, report: Report) -> None:
    """Check that a run which died goes on to the same bytes, with deterministic kernels."""
    steps = ("--max-steps", 10, "--log-every", 1, "--checkpoint-every", 5)
    argv = arguments(opts, "lora", *LOW, *SMALL_PART, *steps, "--out")
    take_step = Trainer.step

    def dying(trainer: Trainer, batch: np.ndarray) -> None:
        if trainer.progress.step == 7:
            raise KeyboardInterrupt
        take_step(trainer, batch)

    torch.use_deterministic_algorithms(True)
    with TemporaryDirectory() as whole, TemporaryDirectory() as broken:
        ours.run([*argv, whole])
        with suppress(KeyboardInterrupt), mock.patch.object(Trainer, "step", dying):
            ours.run([*argv, broken])
        ours.run([*argv, broken, "--resume"])

        weights = [Path(out, "adapter_model.safetensors").read_bytes() for out in (whole, broken)]
        curves = [logged_losses(out) for out in (whole, broken)]
    differ = weights[0] != weights[1] or curves[0] != curves[1]
    report.check("files or losses differ", differ, 0)


def logged_losses(out: str) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(out))]


def empty_share(opts: Namespace, report: Report) -> None:
    """Check that a rank without windows adds zeros and does not fail."""
    for precision in ("fp32", opts.low):
        trainer = make_trainer(opts, "lora", "--precision", precision)
        trainer.ranks = Ranks(rank=1, count=2)
        one_window = next(trainer.batches(0))[:1]  # which rank 0 has
        sent = sent_in_step(trainer, one_window)
        largest = max(tensor.abs().max().item() for tensor in sent)
        report.check(f"{precision}: what it adds", largest, 0)


def sent_in_step(trainer: Trainer, batch: np.ndarray) -> list[Tensor]:
    """Take a step of this rank; return what it hands to the others."""
    sent: list[Tensor] = []

    def keep(ranks: Ranks, tensors: Iterable[Tensor]) -> None:
        sent.extend(tensors)

    with mock.patch.object(Ranks, "all_reduce", keep):
        trainer.step(batch)
    return sent


def two_ranks(opts: Namespace, report: Report) -> None:
    """Check that two ranks train as one process does."""
    if opts.device.is_cuda and torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--standalone", "--nproc-per-node", "2", "train.py"]
    argv = arguments(opts, "lora", *NO_DROPOUT["lora"], *SMALL_PART, "--log-every", 1, "--out")
    with TemporaryDirectory() as both, TemporaryDirectory() as alone:
        subprocess.run([*torchrun, *argv, both], cwd=ROOT, check=True)
        ours.run([*argv, alone])
        difference = relative(logged_losses(both), logged_losses(alone))
    report.check("loss of every step", difference, LOSS["fp32"])
