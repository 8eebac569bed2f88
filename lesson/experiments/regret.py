"""Does LoRA equal full fine-tuning? `python -m lesson.experiments.regret`

Varied: the method and LoRA's rank. At a fixed number of windows, the batch and the number of steps
vary. At a fixed number of steps, the share of the book and the number of passes vary.
Fixed: mini, LoRA on all four layers, alpha 16, 240 windows of 128 tokens.
Measured: the best of three validation perplexities, at the best rate, and the training loss over
the last third, which is the lowest at this rate and the two rates beside it. All have three seeds.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.figures import FULL, LORA
from lesson.experiments.common import as_command, band, describe_seeds, experiment, panels
from lesson.experiments.sweep import (
    ALL,
    Runs,
    at_best,
    best_rate,
    scored,
    training_loss,
    tune,
)
from lesson.figures import draw_at, shades

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "r = 64": ("lora", {"r": 64, "target_modules": ALL}),
    "r = 8": ("lora", {"r": 8, "target_modules": ALL}),
    "r = 1": ("lora", {"r": 1, "target_modules": ALL}),
}

# batch: the steps that read 240 windows, and the first rates to try, for full and for LoRA
BATCHES = {1: (240, 5e-4, 4e-3), 4: (60, 1e-3, 8e-3), 16: (15, 2e-3, 8e-3)}
# stride of the windows: the share of the book that is read, and the first rates to try
SHARES = {
    128: ("all", 5e-4, 4e-3),
    2048: ("a 16th", 1.25e-4, 1e-3),
}


def by_batch(args: argparse.Namespace) -> dict[str, dict[int, Runs]]:
    """Return by method and batch the perplexities at each rate."""
    data: dict[str, dict[int, Runs]] = {}
    for name in ("full", "r = 64", "r = 8"):
        method, options = METHODS[name]
        data[name] = {}
        for batch, (steps, full_guess, guess) in BATCHES.items():
            if method == "full":
                guess = full_guess
            size: dict[str, Any] = {"batch_size": batch, "max_steps": steps}
            runs = tune(method, guess, args.seeds, args.short, score=at_best, **size, **options)
            data[name][batch] = scored(runs, at_best)
    return data


def by_share(args: argparse.Namespace) -> dict[str, dict[int, dict[str, Runs]]]:
    """Return results by method, stride, measure and rate."""
    data: dict[str, dict[int, dict[str, Runs]]] = {}
    for name, (method, options) in METHODS.items():
        data[name] = {}
        for stride, (_, full_guess, guess) in SHARES.items():
            if method == "full":
                guess = full_guess
            size: dict[str, Any] = {"batch_size": 1, "max_steps": 240, "stride": stride}
            runs = tune(method, guess, args.seeds, args.short, score=at_best, **size, **options)
            data[name][stride] = {
                "validation": scored(runs, at_best),
                "training": scored(runs, training_loss),
            }
    return data


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return both tables."""
    return {"by batch": by_batch(args), "by share": by_share(args)}


def at_best_rates(rows: dict[str, Any]) -> Tensor:
    """Return the results (seeds, points) at the best rate of each point."""
    return torch.tensor([runs[best_rate(runs)] for runs in rows.values()]).T


def gaps(lora: dict[str, Any], full: dict[str, Any]) -> Tensor:
    """Return LoRA's loss minus full fine-tuning's loss in nats, (seeds, points)."""
    return (at_best_rates(lora) / at_best_rates(full)).log()


def draw(data: dict[str, Any]) -> Any:
    """Draw LoRA's gap to full fine-tuning by batch and by share, and the training loss by share."""
    seeds = len(at_best_rates(data["by batch"]["full"]))
    caption = (
        "LoRA of rank r is on all four layers of a block, with alpha 16. Windows of 128 tokens. "
        f"Bands: ranges of {describe_seeds(seeds)}."
    )
    figure, (left, middle, right) = panels(
        "How far LoRA stays behind full fine-tuning, each at its best rate (mini)",
        caption,
        "validation, after 240 windows\nin smaller or larger batches",
        "validation, after 240 steps of\n1 window, on more or less text",
        "training, in the last 80\nof these 240 steps",
        height=4.7,
    )
    left.set_ylabel("loss of LoRA - loss of full fine-tuning, nats")
    right.set_ylabel("loss, nats per token")
    middle.sharey(left)
    ranks = [name for name in METHODS if name != "full"]
    colours = {"full": FULL, **dict(zip(reversed(ranks), shades(LORA, len(ranks)), strict=True))}

    batches = data["by batch"]
    for name in batches:
        if name != "full":
            y = gaps(batches[name], batches["full"])
            band(left, range(len(BATCHES)), y, colours[name], f"LoRA, {name}")

    by_share = {name: pick(shares, "validation") for name, shares in data["by share"].items()}
    for name, shares in data["by share"].items():
        label = name if name == "full" else f"LoRA, {name}"
        losses = at_best_rates(pick(shares, "training"))
        band(right, range(len(SHARES)), losses, colours[name], label)
        if name != "full":
            band(middle, range(len(SHARES)), gaps(by_share[name], by_share["full"]), colours[name])

    draw_at(left.xaxis, range(len(BATCHES)), list(BATCHES))
    left.set(xlabel="windows per step", ylim=(0, None))
    for axis in (middle, right):
        draw_at(axis.xaxis, range(len(SHARES)), [name for name, _, _ in SHARES.values()])
        axis.set(xlabel="part of the book that is read")
    right.set(ylim=(0, None))
    left.legend(loc="lower left")
    right.legend(loc="lower left")
    return figure


def pick(shares: dict[str, Any], measured: str) -> dict[str, Any]:
    """Return this measure of the runs of each share."""
    return {stride: found[measured] for stride, found in shares.items()}


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("regret", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
