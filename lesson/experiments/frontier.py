"""Which perplexity for which time? `python -m lesson.experiments.frontier`

Varied: LoRA of rank 8 or 32 on all four layers or full fine-tuning, the batch, the number of
epochs, and the text.
Fixed: mini in fp32, and windows of 128 tokens without overlap. LoRA takes the rate of
`rule`, at most 8e-3. Full fine-tuning takes a tenth of that rate.
Measured: the perplexity of the model that `train.py` saves, and the processor time of the steps.
"""

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import Any

from common.figures import FULL, LORA, draw_at, shades
from data.windows import Windows
from lesson.experiments.common import (
    SHORT,
    Steps,
    as_command,
    describe_seeds,
    experiment,
    panels,
    train_options,
)
from lesson.experiments.rates import rule
from lesson.experiments.recipes import stored
from training.options import BEST, BOOK, ROOT

TEXTS: dict[str, dict[str, Any]] = {
    "book": {"book": BOOK, "stride": 128},
    "instructions": {"data": ROOT / "data" / "instructions.jsonl"},
}
# The rank, the windows per step and the epochs. Full fine-tuning has no rank.
METHODS: dict[str, tuple[int | None, tuple[int, ...], tuple[int, ...]]] = {
    "LoRA, r = 8": (8, (1, 2, 4, 16), (1, 2, 3, 6)),
    "LoRA, r = 32": (32, (2, 16), (1, 3)),
    "full": (None, (2, 16), (1, 3)),
}
LIMIT = 8e-3  # of the rule
CHOSEN = "2 windows, 3 epochs"  # by --recipe best
SPAN = 1.6  # of the perplexities in a panel


def run(words: dict[str, Any], r: int | None, short: bool) -> dict[str, float]:
    """Return the result of LoRA of rank r, or of full fine-tuning if r is None."""
    words = words | {"device": "cpu", "precision": "fp32"}
    if short:
        words |= SHORT
    best = words | {"recipe": BEST}
    plan = Steps(train_options("lora", best)).plan
    data = plan.data.training
    share = 1.0  # of the tokens that an epoch reads
    if isinstance(data, Windows):
        share = len(data) * data.block_size / len(data.tokens)
    passes = words["epochs"] * share
    rate = float(f"{min(rule(plan.total_steps, passes), LIMIT):.1e}")
    if r:
        return stored(train_options("lora", best | {"r": r, "lr": rate}), short)
    return stored(train_options("full", words | {"lr": rate / 10}), short)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the result with each seed, by text, by method, and by batch and epochs."""
    data: dict[str, Any] = {text: {label: {} for label in METHODS} for text in TEXTS}
    short = args.short
    for text, source in TEXTS.items():
        for label, (r, batches, all_epochs) in METHODS.items():
            for batch_size in batches[:1] if short else batches:
                for epochs in all_epochs[:1] if short else all_epochs:
                    words = {**source, "batch_size": batch_size, "epochs": epochs}
                    found = [run(words | {"seed": seed}, r, short) for seed in args.seeds]
                    name = f"{batch_size} windows, {epochs} epochs"
                    print(f"{text}, {label}, {name}: {found}", flush=True)
                    data[text][label][name] = found
    return data


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (seconds, perplexity) whose perplexity no faster point reaches."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw(data: dict[str, Any]) -> Any:
    """Draw the frontier of each method, and ring the choice of `--recipe best`. Both panels show
    the same factor between the lowest and the highest perplexity.
    """
    count = len(next(iter(data["book"]["full"].values())))
    caption = (
        "Dot: a batch (1 to 16 windows of 128 tokens per step) and a number of epochs (1 to 6). "
        "Line: the dots with a lower perplexity than all faster dots. LoRA is on all four layers "
        "of a block, at the rate of --recipe best, and full fine-tuning is at a tenth of that "
        f"rate. fp32, {describe_seeds(count)}. Both panels span a factor of {SPAN} in perplexity."
    )
    titles = (f"validation perplexity: the {text} (log)" for text in data)
    whole = "Which perplexity for which time? (mini)"
    figure, axes = panels(whole, caption, *titles, height=4.8)
    colours = dict(zip(METHODS, [*shades(LORA, 2), FULL], strict=True))
    for axis, methods in zip(axes, data.values(), strict=True):
        for label, runs in methods.items():
            points = {
                name: tuple(mean(seed[key] for seed in found) for key in ("seconds", "perplexity"))
                for name, found in runs.items()
            }
            colour = colours[label]
            axis.scatter(*zip(*points.values(), strict=True), color=colour, s=12)
            axis.plot(
                *zip(*frontier(list(points.values())), strict=True), color=colour, label=label
            )
            if label == "LoRA, r = 8" and CHOSEN in points:
                axis.plot(
                    *points[CHOSEN], "o", color="black", fillstyle="none", label="--recipe best"
                )
        lowest = 0.97 * axis.dataLim.ymin
        axis.set(xscale="log", yscale="log", xlabel="processor seconds of the steps (log)")
        axis.set(ylim=(lowest, SPAN * lowest))
        draw_at(axis.xaxis, (5, 10, 20, 50, 100, 200))
        draw_at(axis.yaxis, [p for p in range(20, 100, 2) if lowest < p < SPAN * lowest])
    axes[0].sharex(axes[1])
    axes[0].autoscale(axis="x")
    axes[1].legend()
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("frontier", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
