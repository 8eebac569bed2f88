"""How much does rounding lose in a merge? `python -m lesson.experiments.merge_error`

Varied: the size of an update B A relative to the weight W, and the precision of W.
Fixed: W, the first c_attn of mini, and one random B A of rank 8. W + B A is computed exactly and
rounded once.
Measured: the error of the merged update, relative to the norm of the update, and the share of
weights that do not change. Also measured: the size of updates in an adapter after 60 steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.device import PRECISIONS
from common.figures import INK, LORA, scientific
from lesson.experiments.common import as_command, experiment, panels, trainer
from lesson.experiments.sweep import SIZE, train
from lesson.figures import OTHER, draw_at, name_line, shades
from lora.inject import lora_layers

# Coarser formats are darker.
COLOURS = dict(zip(("bf16", "fp16", "fp32"), shades(OTHER, 3), strict=True))


def losses(base: Tensor, ba: Tensor, sizes: list[float], dtype: torch.dtype) -> dict[str, list]:
    """Return the loss of an update of each size, when merged into the base in this precision.

    `base`, which is W, and `ba`, which is B A, are (out, in) in fp64. A size is a ratio of norms.
    """
    before = base.to(dtype)
    errors = []
    unmoved = []
    for size in sizes:
        update = ba * (size * base.norm() / ba.norm())
        after = (before.double() + update).to(dtype)
        error = after.double() - before.double() - update
        errors.append((error.norm() / update.norm()).item())
        unmoved.append((before == after).double().mean().item())
    return {"error": errors, "unmoved": unmoved}


def measure() -> dict[str, Any]:
    made = trainer(lr=8e-3, **SIZE)
    train(made)
    layers = list(lora_layers(made.model).values())
    base = layers[0].base_layer.weight.double()  # (out, in)
    torch.manual_seed(0)
    ba = torch.randn(base.size(0), 8).double() @ torch.randn(8, base.size(1)).double()

    sizes = (10 ** torch.linspace(-6, 0, 25)).tolist()
    data: dict[str, Any] = {"size": sizes}
    for name, dtype in PRECISIONS.items():
        data[name] = losses(base, ba, sizes, dtype)
    trained = []
    for layer in layers:
        trained.append((layer.delta_weight().norm() / layer.base_layer.weight.norm()).item())
    data["adapter"] = trained
    return data


def draw(data: dict[str, Any]) -> Any:
    """Draw the error, and the share of unchanged weights, by the size of the update."""
    figure, axes = panels(
        "What rounding W + B A loses of B A, by the precision of W (mini)",
        "W: the first c_attn. B A: one random matrix of rank 8, scaled to each size. A trained "
        f"adapter: its {len(data['adapter'])} layers (c_attn, rank 8) after 60 steps at lr 8e-3, "
        "seed 0.",
        "error, % of the update's norm (log)",
        "weights that do not move, %",
    )
    sizes = data["size"]
    for axis, what in zip(axes, ("error", "unmoved"), strict=True):
        for name, colour in COLOURS.items():
            percent = [100 * share for share in data[name][what]]
            axis.plot(sizes, percent, color=colour, label=f"W in {name}")
        axis.axvspan(min(data["adapter"]), max(data["adapter"]), color=LORA, alpha=0.3)
        axis.set(xscale="log", xlabel="size of the update: rms(B A) / rms(W) (log)")
        powers = [10.0**k for k in range(-6, 1)]
        draw_at(axis.xaxis, powers, [scientific(power) for power in powers])

    error, unmoved = axes
    error.set(yscale="log", ylim=(None, 1e3))
    draw_at(error.yaxis, [100, 1, 1e-2, 1e-4], ["100", "1", "0.01", "0.0001"])
    error.axhline(100, color=INK, linewidth=0.8)
    name_line(error, "100 %: nothing of it is left", (1e-6, 230), INK, (0, 0))
    error.legend(loc="lower left")
    trained = (min(data["adapter"]), 80)
    name_line(unmoved, "a trained\nadapter", trained, LORA, (-5, 0), "right")
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("merge_error", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
