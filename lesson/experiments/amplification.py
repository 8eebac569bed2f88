"""What does LoRA amplify? `python -m lesson.experiments.amplification`

Varied: the method, and LoRA's rank on all four layers.
Fixed: mini, the default book, alpha 16, 60 steps of 4 windows of 128 tokens, three seeds.
Measured for each weight W and the change dW = U S V^T, as in Hu et al. 2021, 7.3: the norm of W in
the directions of the change, ||U^T W V||, relative to the same number of the largest directions of
W and of random directions, and the amplification factor ||dW|| / ||U^T W V||. Squared norms are
summed over the blocks. For full fine-tuning, only the 64 largest directions of the change count.
"""

import argparse
import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from common.figures import FULL, INK, LORA
from lesson.experiments.changes import LAYERS, TOP, load_base, taken_apart
from lesson.experiments.common import as_command, describe_seeds, experiment, panels
from lesson.experiments.intruders import RUNS, run_name
from lesson.experiments.sweep import finetune
from lesson.figures import draw_at, name_line, shades

SHOWN = ("r = 1", "r = 8", "r = 64", "full")  # names in RUNS


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the result of `ratios` by run and layer, for each seed."""
    base = load_base()
    data: dict[str, Any] = {}
    for name in SHOWN:
        method, options = RUNS[name]
        rank = options["r"] if method == "lora" else TOP
        found = finetune(method, args.seeds, args.short, taken_apart(args.short), **options)
        data[name] = {}
        for kind in LAYERS:
            size = base.get_parameter(f"h.0.{kind}.weight").numel()
            data[name][kind] = [ratios(run["layers"], kind, rank, size) for run in found]
    return data


def ratios(layers: list[dict[str, Any]], kind: str, rank: int, size: int) -> dict[str, float]:
    """Return one layer's amplification factor, and the size of W in the directions of the change,
    relative to random directions and to the largest directions of W.

    For r random directions on either side, the mean of ||U^T W V||^2 is r^2 ||W||^2 / size, where
    size is the number of entries of W.
    """
    blocks = [layer for layer in layers if layer["layer"].endswith(f"{kind}.weight")]
    there = norm(blocks, "weight in the change's directions")
    return {
        "amplification": norm(blocks, "change") / there,
        "to random": there / (rank * norm(blocks, "weight") / math.sqrt(size)),
        "to its own": there / norm(blocks, "weight in its own"),
    }


def norm(blocks: list[dict[str, Any]], key: str) -> float:
    """Return the norm over all blocks."""
    return math.hypot(*[block[key] for block in blocks])


def draw(data: dict[str, Any]) -> Any:
    """Draw the amplification by layer."""
    [count] = {len(runs) for kinds in data.values() for runs in kinds.values()}
    caption = (
        f"Size: Frobenius norm over all blocks. Of the change by full fine-tuning, only the {TOP} "
        "largest directions count. LoRA has rank r on all four layers of a block, and alpha 16. 60 "
        "steps of 4 windows of 128 tokens. Compare equal ranks only. Point, line: mean, range of "
        f"{describe_seeds(count)}."
    )
    whole = "How much larger is a change than W, in the directions of the change? (mini)"
    figure, (axis,) = panels(whole, caption, height=4.8)
    for i, (name, kinds) in enumerate(data.items()):
        colour = [*shades(LORA, len(data) - 1), FULL][i]
        for row, kind in enumerate(LAYERS):
            factors = [run["amplification"] for run in kinds[kind]]
            y = row + 0.18 * (i - 1.5)  # so that no point hides
            axis.plot([min(factors), max(factors)], [y, y], color=colour)
            axis.plot(mean(factors), y, "o", color=colour, label="" if row else run_name(name))
    axis.axvline(1, color=INK, linewidth=1, linestyle="--")
    name_line(axis, "as large as W", (1, -0.42), INK)
    axis.set(
        xscale="log",
        xlabel="size of the change / size of W, both in the directions of the change (log)",
        ylim=(len(LAYERS) - 0.5, -0.6),
    )
    draw_at(axis.yaxis, range(len(LAYERS)), LAYERS)
    draw_at(axis.xaxis, (0.1, 1, 10, 100))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("amplification", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
