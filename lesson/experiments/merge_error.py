"""Measure what rounding does to a merged update: `python -m lesson.experiments.merge_error`."""

import torch

from common.device import PRECISIONS
from lesson.experiments.common import BLUE, GREY, RED, YELLOW, panels, parse, save
from lesson.experiments.sweep import tuned
from lora.inject import lora_layers


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    layers = [*lora_layers(tuned("LoRA", 42, args.short)[0].model).values()]
    base = layers[0].base_layer.weight.double()  # (out, in)
    torch.manual_seed(0)
    ba = torch.randn(base.size(0), 8).double() @ torch.randn(8, base.size(1)).double()
    data = {"size": (10 ** torch.linspace(-6, 0, 7 if args.short else 25)).tolist()}
    figure, axes = panels(
        "Merging: what rounding W + B A loses of B A (mini, c_attn)",
        "error, % of the update's norm",
        "weights that do not move, %",
    )
    for (name, dtype), colour in zip(PRECISIONS.items(), (GREY, RED, BLUE), strict=True):
        before, data[name] = base.to(dtype), {"error": [], "unmoved": []}
        for size in data["size"]:
            update = ba * (size * base.norm() / ba.norm())
            after = (before.double() + update).to(dtype)  # summed exactly, rounded once
            error = after.double() - before.double() - update
            data[name]["error"].append((error.norm() / update.norm()).item())
            data[name]["unmoved"].append((before == after).double().mean().item())
        for axis, values in zip(axes, data[name].values(), strict=True):
            axis.plot(data["size"], [100 * x for x in values], ".-", color=colour, label=name)
    sizes = [(x.delta_weight().norm() / x.base_layer.weight.norm()).item() for x in layers]
    for axis in axes:
        axis.axvspan(min(sizes), max(sizes), color=YELLOW, alpha=0.35, label="a trained adapter's")
        axis.set(xscale="log", xlabel="size of the update: rms(B A) / rms(W)")
    axes[0].set_yscale("log")
    axes[0].axhline(100, color="black", linewidth=0.8)
    axes[0].text(1, 120, "nothing left", ha="right", va="bottom", fontsize=8)
    axes[0].legend()
    return save(args, "merge_error", data | {"adapter": sizes}, figure)


if __name__ == "__main__":
    main()
