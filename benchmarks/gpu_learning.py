"""Parts of `verify_gpu.py`: a run learns what PEFT's does, under every option, and never waits.

A part takes the options and adds to a report. Each case is tried by itself.
"""

import warnings
from argparse import Namespace

import torch

from benchmarks import ours, peft_loop
from benchmarks.parity_report import Report
from data.windows import Windows
from training.launch import GraphedLoss
from training.options import ROOT

# Of a loss before the first step, relative: what rounding makes of one forward pass.
START = {"fp32": 1e-5, "TF32": 2e-3, "bf16": 5e-3, "fp16": 1e-3}
DECREASE = 0.2  # how far what is learned may be from what PEFT learns in fp32, relative
NO_DROPOUT = {
    "lora": ("--base-dropout", "0", "--lora-dropout", "0"),
    "full": ("--base-dropout", "0"),
}
RATE = {"lora": ("--lr", "1e-2"), "full": ("--lr", "1e-3")}  # to learn much in few steps
LOW = ("--precision", "low")
COMPILE = ("--compile",)
CHECKPOINTING = ("--gradient-checkpointing",)
PARTS = ("--grad-accum", "3")
GRAPH = ("--cuda-graph",)
CASES: dict[str, tuple[str, ...]] = {  # what changes a step's computation
    "fp32": (),
    "fp32, checkpointing": CHECKPOINTING,
    "fp32, 3 parts": PARTS,
    "fp32, graph": GRAPH,
    "TF32": ("--allow-tf32",),
    "fp32, compiled": COMPILE,
    "low": LOW,
    "low, 3 parts": (*LOW, *PARTS),
    "low, graph": (*LOW, *GRAPH),
    "low, compiled": (*LOW, *COMPILE),
    "low, all": (*LOW, *COMPILE, *CHECKPOINTING, *PARTS),
}
# A dry run has no GPU for a graph, a compiler takes minutes, and a completion exceeds its block.
NOT_DRY = {*GRAPH, *COMPILE, "--data"}
CUDA_ALONE = {"--allow-tf32", *COMPILE, *CHECKPOINTING, *GRAPH}  # of these options
CONVERSATIONS = ROOT / "data" / "instructions.jsonl"
WAITING: dict[str, tuple[object, ...]] = {
    "lora, fp32": ("lora", "--precision", "fp32"),
    "lora": ("lora", *LOW),
    "lora, fp16": ("lora", "--precision", "fp16"),
    "lora, 3 parts": ("lora", *LOW, *PARTS),
    "lora, checkpointing": ("lora", *LOW, *CHECKPOINTING),
    "lora, graph": ("lora", *LOW, *GRAPH),
    "lora, compiled": ("lora", *LOW, *COMPILE),
    "lora, --use-dora": ("lora", *LOW, "--use-dora"),
    "lora, slices": ("lora", *LOW, "--target-modules", "c_attn.q", "c_attn.v"),
    "lora, --data": ("lora", *LOW, "--data", CONVERSATIONS),
    "full": ("full", *LOW),
}


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


def make_trainer(opts: Namespace, method: str, *more: object) -> ours.Trainer:
    torch.compiler.reset()
    return ours.Trainer(ours.options(*arguments(opts, method, *more)))


def runs_here(opts: Namespace, more: tuple[object, ...]) -> bool:
    """Return whether the device, or the dry run, has these options."""
    if opts.dry_run and not NOT_DRY.isdisjoint(more):
        return False
    return opts.device.torch_device.type != "mps" or CUDA_ALONE.isdisjoint(more)


def learning(opts: Namespace, report: Report) -> None:
    """Train on one batch, without dropout: here under every option, and by PEFT in fp32.

    Every run must start at PEFT's loss, and learn as much.
    """
    for method in ("lora", "full"):
        there = their_losses(opts, method)
        report.facts[f"{method}: PEFT's loss"] = f"{there[0]:.4f} to {there[-1]:.4f}"
        for name, more in CASES.items():
            called = f"{method}, {name.replace('low', opts.low)}"
            if runs_here(opts, more):
                with report.trying(called):
                    here = our_losses(opts, method, *more)
                    compare(report, called, here, there)


def compare(report: Report, name: str, here: list[float], there: list[float]) -> None:
    precision = name.split(", ")[1]
    start = abs(here[0] / there[0] - 1)
    report.check(f"{name}: loss at the start, relative", start, START[precision])
    learned = (here[0] - here[-1]) / (there[0] - there[-1])
    report.check(f"{name}: what it learns, over PEFT's, from 1", abs(learned - 1), DECREASE)


def our_losses(opts: Namespace, method: str, *more: object) -> list[float]:
    trainer = make_trainer(opts, method, *NO_DROPOUT[method], *RATE[method], *more)
    batch = next(trainer.batches())
    return [ours.step(trainer, batch) for _ in range(opts.steps)]


def their_losses(opts: Namespace, method: str) -> list[float]:
    args = ours.options(*arguments(opts, method, *NO_DROPOUT[method], *RATE[method]))
    trained, _ = ours.data(args)
    batch = trained.epoch_order(args.seed, 0)[: opts.batch]
    model = peft_loop.build(args).to(opts.device.torch_device)
    losses, _ = peft_loop.train(model, args, trained.tokens, [batch] * opts.steps)
    return losses


def no_waiting(opts: Namespace, report: Report) -> None:
    """Check that a step never waits for the GPU: PyTorch raises where one would."""
    outcome = "a step does not wait" if opts.device.is_cuda else "tried; waits show on CUDA alone"
    for name, (method, *more) in WAITING.items():
        if not runs_here(opts, tuple(more)):
            continue
        with report.trying(name):
            trainer = make_trainer(opts, str(method), *more)
            batches = trainer.batches()
            for mode in ("default", "default", "error"):  # the first make what later ones keep
                set_sync_mode(opts, mode)
                trainer.step(next(batches))
            report.facts[name] = outcome
            check_graph(report, name, trainer)
        set_sync_mode(opts, "default")
    with report.trying("evaluation"):
        few, many = (waits_in_evaluation(opts, batches) for batches in (2, 4))
        report.check("evaluation: waits for two batches more", many - few, 0)


def check_graph(report: Report, name: str, trainer: ours.Trainer) -> None:
    """Check that a run with --cuda-graph has its graph: for the run, a failed capture is a
    warning.
    """
    loss = trainer.model.loss
    if isinstance(loss, GraphedLoss):
        report.check(f"{name}: graphs that could not be captured", int(loss.graphed is None), 0)


def waits_in_evaluation(opts: Namespace, count: int) -> int:
    """Return how often scoring `count` batches waits: once, for the sums, is right."""
    trainer = make_trainer(opts, "lora", *LOW)
    validation = trainer.data.validation
    assert isinstance(validation, Windows) and validation.byte_counts is not None
    end = 2 * count * opts.block + 1
    counts = validation.byte_counts[:end]
    text = Windows(validation.tokens[:end], opts.block, opts.block, byte_counts=counts)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        set_sync_mode(opts, "warn")
        try:
            ours.score(trainer.model, text, trainer.run.device, batch_size=2)
        finally:
            set_sync_mode(opts, "default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def set_sync_mode(opts: Namespace, mode: str) -> None:
    if opts.device.is_cuda:
        torch.cuda.set_sync_debug_mode(mode)
