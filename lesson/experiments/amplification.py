"""What does LoRA amplify? `python -m lesson.experiments.amplification`

Varied: the method, and LoRA's rank on all four layers.
Fixed: mini, the default book, alpha 16, 60 steps of 8 windows of 64 tokens, three seeds.
Measured for each weight W and its change dW = U S V^T, as in Hu et al. 2021, 7.3: the norm of W in
the change's own directions, ||U^T W V||, beside that in as many of W's own largest directions and
in random ones; and the amplification factor ||dW|| / ||U^T W V||. Of full fine-tuning's change the
64 largest directions count.
"""

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import Any

from common.figures import FULL, LORA, draw_at, shades
from lesson.experiments.changes import LAYERS, taken_apart
from lesson.experiments.common import experiment, panels
from lesson.experiments.intruders import RUNS
from lesson.experiments.sweep import finetune

SHOWN = ("r = 1", "r = 8", "r = 64", "full")  # of RUNS


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return by run, layer and measure its mean over the blocks, for each seed."""
    data: dict[str, Any] = {}
    for name in SHOWN:
        method, options = RUNS[name]
        found = finetune(method, args.seeds, args.short, taken_apart(args.short), **options)
        data[name] = {}
        for kind in LAYERS:
            runs = []
            for run in found:
                own = [
                    layer for layer in run["layers"] if layer["layer"].endswith(f"{kind}.weight")
                ]
                runs.append([ratios(layer) for layer in own])
            data[name][kind] = {
                key: [mean(block[key] for block in blocks) for blocks in runs] for key in runs[0][0]
            }
    return data


def ratios(layer: dict[str, Any]) -> dict[str, float]:
    """Return one weight's amplification factor, and how large W is in the change's directions
    relative to random ones and to its own largest.
    """
    there = layer["weight in the change's directions"]
    return {
        "amplification": layer["change"] / there,
        "W there / in random directions": there / layer["weight in random ones"],
        "W there / in its own largest": there / layer["weight in its own"],
    }


def draw(data: dict[str, Any]) -> Any:
    """Draw the amplification by layer, and how large W is where it is changed."""
    titles = {
        "amplification": "amplification factor,\n||dW|| / ||U^T W V||",
        "W there / in random directions": "||U^T W V||, relative to\nrandom directions",
        "W there / in its own largest": "||U^T W V||, relative to\nW's own largest",
    }
    figure, axes = panels("What the change amplifies (mini, all four layers)", *titles.values())
    colours = [*shades(LORA, len(data) - 1), FULL]
    for axis, key in zip(axes, titles, strict=True):
        for (name, kinds), colour in zip(data.items(), colours, strict=True):
            y = [mean(kinds[kind][key]) for kind in LAYERS]
            axis.plot(range(len(LAYERS)), y, "o", color=colour, label=name)
        axis.set(xlim=(-0.5, len(LAYERS) - 0.5), yscale="log")
        axis.tick_params(axis="x", rotation=40)
        draw_at(axis.xaxis, range(len(LAYERS)), LAYERS)
        if key != "amplification":
            axis.axhline(1, color="black", linewidth=0.8)
    axes[0].legend()
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("amplification", measure, draw, __doc__, argv)


if __name__ == "__main__":
    main()
