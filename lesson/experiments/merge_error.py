"""What does merging round away? `python -m lesson.experiments.merge_error`

Varied: the size of an update B A beside the weight W, and the precision in which W is stored.
Fixed: W, the first c_attn of mini, and one random B A of rank 8. W + B A is summed exactly and
rounded once.
Measured: the error of the merged update, as a share of the update's norm, and the share of the
weights that do not move. Beside it: the size of the updates in an adapter trained for 60 steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.device import PRECISIONS
from lesson.experiments.common import BLUE, GREY, RED, YELLOW, panels, parse, save
from lesson.experiments.sweep import tuned
from lora.inject import lora_layers

COLOURS = {"fp32": GREY, "bf16": RED, "fp16": BLUE}


def losses(base: Tensor, ba: Tensor, sizes: list[float], dtype: torch.dtype) -> dict[str, list]:
    """Return what an update of each size loses when it is merged into the base in this precision.

    `base` and `ba`, W and B A, are (out, in) in fp64; a size is the ratio of their norms.
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


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    made, _ = tuned("LoRA", 42, args.short)
    layers = list(lora_layers(made.model).values())
    base = layers[0].base_layer.weight.double()  # (out, in)
    torch.manual_seed(0)
    ba = torch.randn(base.size(0), 8).double() @ torch.randn(8, base.size(1)).double()

    sizes = (10 ** torch.linspace(-6, 0, 7 if args.short else 25)).tolist()
    data: dict[str, Any] = {"size": sizes}
    for name, dtype in PRECISIONS.items():
        data[name] = losses(base, ba, sizes, dtype)
    trained = []
    for layer in layers:
        trained.append((layer.delta_weight().norm() / layer.base_layer.weight.norm()).item())
    data["adapter"] = trained

    figure, axes = panels(
        "Merging: what rounding W + B A loses of B A (mini, c_attn)",
        "error, % of the update's norm",
        "weights that do not move, %",
    )
    for axis, measure in zip(axes, ("error", "unmoved"), strict=True):
        for name, colour in COLOURS.items():
            percent = [100 * share for share in data[name][measure]]
            axis.plot(sizes, percent, ".-", color=colour, label=name)
        axis.axvspan(
            min(trained), max(trained), color=YELLOW, alpha=0.35, label="a trained adapter's"
        )
        axis.set(xscale="log", xlabel="size of the update: rms(B A) / rms(W)")
    axes[0].set_yscale("log")
    axes[0].axhline(100, color="black", linewidth=0.8)
    axes[0].text(1, 120, "nothing left", ha="right", va="bottom", fontsize=8)
    axes[0].legend()
    return save(args, "merge_error", data, figure)


if __name__ == "__main__":
    main()
