"""Write the report of a run: `run.json`, `loss.png`, and the last lines printed."""

import json
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from common.errors import UserError
from common.figures import BASE, METHODS, PAGE_WIDTH, can_draw, new_figure, save_figure, scientific
from common.files import open_file, write_json
from evaluation.scores import perplexity
from lora import count_parameters
from storage.runs import RUN
from training.directory import METRICS
from training.options import REFERENCE, Options


def parameter_counts(model: nn.Module) -> dict[str, float]:
    """Return the fields of `run.json` that count parameters."""
    trainable, total = count_parameters(model)
    return {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
    }


def describe_parameters(model: nn.Module) -> str:
    """Return the line that PEFT's `print_trainable_parameters` would print."""
    return (
        "trainable params: {trainable_parameters:,} || all params: {total_parameters:,} || "
        "trainable%: {trainable_percent:.4f}".format(**parameter_counts(model))
    )


def write_report(options: Options, report: dict[str, Any]) -> None:
    """Write `run.json`, and draw `loss.png`."""
    best = report["best_val_loss"]
    base = report["base_val_loss"]
    content = {
        "base": options.base,
        **report,
        "base_val_perplexity": perplexity(base),
        "best_val_perplexity": perplexity(best),
    }
    lines = metrics_or_warning(options.out)
    draw_loss(options, report, lines)
    write_json(options.out / RUN, content)  # written last, to mark a complete run

    print(
        f"best: val perplexity {perplexity(best):.3f} (base {perplexity(base):.3f}) "
        f"after {report['seconds']:.0f} s; saved in {options.out}"
    )
    model = "--adapter" if options.method == "lora" else "--base"
    start = "--chat" if options.data else '--prompt "Some text to continue"'
    print(f"next: python generate.py {model} {shlex.quote(str(options.out))} {start}")
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    if best >= base:
        print(f"warning: {advice(options, report, losses)}", file=sys.stderr)
    elif losses:
        print(advice(options, report, losses))


def advice(options: Options, report: Mapping[str, Any], losses: Sequence[float]) -> str:
    """Return what to try next, and why. `losses` are the validation losses in order."""
    half = f"--lr {report['lr'] / 2:.2g}"
    twice = f"--lr {report['lr'] * 2:.2g}"
    best = report["best_val_loss"]
    if best >= report["base_val_loss"]:
        saved = "the saved model is the base"
        if options.method == "lora":
            saved = "the saved adapter changes nothing"
        line = f"no validation was better than the base, so {saved}; try {half}, or another text"
    elif losses[0] == best and len(losses) > 1:
        line = "the first validation was the best, so later steps did not help; try "
        line += f"--epochs 1, or {half}" if options.epochs > 1 else half
    elif losses[-1] == best and len(losses) > 1:
        line = f"the last validation was the best, so the loss may fall further; try {twice}"
        line += ", or more --epochs"
    else:
        line = f"to check the learning rate, try {half} and {twice}"
    if options.recipe == REFERENCE:
        line += "; --recipe best trains all layers, at a rate that fits the text"
    return line


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`. Raises UserError if the file is damaged."""
    path = out / METRICS
    with open_file(path) as file:
        text = file.read().decode(errors="replace")
    try:
        lines = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines ({error})") from error
    if not all(isinstance(line, dict) and {"step", "loss"} <= line.keys() for line in lines):
        raise UserError(f"{path}: a line has no step or no loss")
    return lines


def metrics_or_warning(out: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`. If the file was damaged before the run was resumed,
    print a warning, and return no lines."""
    try:
        return read_metrics(out)
    except UserError as error:
        print(f"warning: {error}; loss.png is not drawn", file=sys.stderr)
        return []


def describe_run(options: Options, lr: float) -> str:
    """Return the model, the method, and the choices that affect the loss most."""
    method = "full fine-tuning"
    if options.method == "lora":
        targets = options.target_modules
        names = targets if isinstance(targets, str) else " ".join(targets)
        method = f"LoRA of rank {options.r} on {names}"
    return (
        f"{Path(options.base).name}, {method}: lr {scientific(lr)}, {options.batch_size} "
        f"windows of {options.block_size} tokens per step, seed {options.seed}"
    )


def draw_loss(options: Options, report: Mapping[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    """Draw `loss.png`: training loss, validation loss, and the base's validation loss."""
    if not can_draw() or not lines:
        return
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    validations = [line for line in lines if "val_loss" in line]
    val_steps = [0] + [line["step"] for line in validations]
    val_losses = [report["start_val_loss"]] + [line["val_loss"] for line in validations]

    colour = METHODS[options.method]
    figure = new_figure((PAGE_WIDTH, 4.2))
    axes = figure.subplots()
    axes.plot(steps, losses, color=colour, alpha=0.4, linewidth=1.2, label="training")
    axes.plot(val_steps, val_losses, color=colour, marker="o", label="validation")
    saved_loss, saved_step = min(zip(val_losses, val_steps, strict=True))
    ring = {"marker": "o", "color": "white", "markeredgecolor": colour, "linestyle": "none"}
    axes.plot(saved_step, saved_loss, **ring, label="saved")
    axes.axhline(
        report["base_val_loss"],
        color=BASE,
        linestyle="--",
        label="base before training, validation",
    )
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title=textwrap.fill(describe_run(options, report["lr"]), 100),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    save_figure(figure, options.out / "loss.png")
