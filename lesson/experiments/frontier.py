"""Which perplexity for which time? `python -m lesson.experiments.frontier`

Varied: LoRA of rank 8 or 32 on all four layers or full fine-tuning, the batch, the number of
epochs, and the text.
Fixed: mini in fp32, and windows of 128 tokens without overlap. LoRA takes the rate of
`rule`, at most 8e-3. Full fine-tuning takes a tenth of that rate.
Measured: the perplexity of the model that `train.py` saves, and the processor time of the steps.
"""

import argparse
import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from common.figures import FULL, INK, LORA
from lesson.experiments.common import (
    SHORT,
    as_command,
    describe_seeds,
    experiment,
    panels,
    train_options,
)
from lesson.experiments.rates import rate_of_the_rule
from lesson.experiments.sweep import stored
from lesson.figures import draw_at, name_line, shades
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
CHOSEN = "2 windows, 3 epochs"  # by --recipe best
LINES = {2: "o-", 16: "o--"}  # the batches in the picture
SPAN = 1.6  # of the perplexities in a panel


def run(words: dict[str, Any], r: int | None, short: bool) -> dict[str, float]:
    """Return the result of LoRA of rank r, or of full fine-tuning if r is None."""
    words = words | {"device": "cpu", "precision": "fp32"}
    if short:
        words |= SHORT
    best = words | {"recipe": BEST}
    rate = rate_of_the_rule(train_options("lora", best))
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


def draw(data: dict[str, Any]) -> Any:
    """Draw a line over the epochs for each method, with batches of 2 and of 16. Both panels show
    the same factor between the lowest and the highest perplexity.
    """
    count = len(next(iter(data["book"]["full"].values())))
    caption = (
        "Number at a point: epochs. LoRA of rank r is on all four layers of a block, at the rate "
        "of the rule in docs/experiments.md, at most 8e-3. Full fine-tuning is at a tenth of "
        "that rate (not tuned). Circle: the batch and the epochs of --recipe best. fp32, "
        f"{describe_seeds(count)}. Both panels span a "
        f"factor of {SPAN} in perplexity."
    )
    titles = (f"validation perplexity: the {text} (log)" for text in data)
    whole = "Small batches and large batches: which perplexity for which time? (mini)"
    figure, axes = panels(whole, caption, *titles, height=4.8)
    colours = dict(zip(METHODS, [*shades(LORA, 2), FULL], strict=True))
    for axis, methods in zip(axes, data.values(), strict=True):
        for label, runs in methods.items():
            for windows, line in LINES.items():
                draw_epochs(
                    axis, runs, windows, f"{label}, batches of {windows}", colours[label], line
                )
        chosen = place(methods["LoRA, r = 8"].get(CHOSEN))
        axis.plot(*chosen, "o", color=INK, fillstyle="none", markersize=12)
        lowest = 0.97 * axis.dataLim.ymin
        axis.set(xscale="log", yscale="log", xlabel="processor seconds of the steps (log)")
        axis.set(ylim=(lowest, SPAN * lowest))
        draw_at(axis.xaxis, (5, 10, 20, 50, 100, 200))
        draw_at(axis.yaxis, [p for p in range(20, 100, 2) if lowest < p < SPAN * lowest])
    axes[0].sharex(axes[1])
    axes[0].autoscale(axis="x")
    axes[1].legend(handlelength=4)
    return figure


def draw_epochs(
    axis: Any, runs: dict[str, Any], windows: int, label: str, colour: str, line: str
) -> None:
    """Draw a line through the results of one batch size, with the epochs beside the points."""
    points = {}
    for name, found in runs.items():
        if name.startswith(f"{windows} "):
            points[name.split()[2]] = place(found)
    if not points:  # a short version has one batch size
        return
    axis.plot(*zip(*points.values(), strict=True), line, color=colour, label=label)
    for epochs, point in points.items():
        name_line(axis, epochs, point, colour, (4, -8) if "32" in label else (4, 7))


def place(found: list[dict[str, float]] | None) -> tuple[float, float]:
    """Return the mean seconds and the mean perplexity of the seeds."""
    seeds = found or [{"seconds": math.nan, "perplexity": math.nan}]
    return mean(run["seconds"] for run in seeds), mean(run["perplexity"] for run in seeds)


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("frontier", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
