"""Measure what rounding does to a merged update: `python -m experiments.merge_error`.

Takes a c_attn of mini, stored in a precision; adds B A of rank 8 and of many sizes, exactly; stores
the sum in that precision; compares what was gained with B A. Marks a trained adapter's sizes if
`--lora` is one.
"""

import torch
from torch import Tensor

from common.device import PRECISIONS
from experiments import common
from experiments.common import BLUE, GREY, RED, YELLOW, panels, parse, save
from lora.adapter import WEIGHTS
from model.hub import find_base
from model.weights import load_gpt2

COLOURS = {"fp32": GREY, "bf16": RED, "fp16": BLUE}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def rounding(base: Tensor, update: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The error in the update, as a share of its norm, and the share of weights that never move."""
    before = base.to(dtype)
    after = (before.double() + update).to(dtype)  # summed exactly, rounded once
    kept = after.double() - before.double()
    return rms(kept - update) / rms(update), (before == after).double().mean().item()


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv, lora="runs/lora")
    weights = dict(load_gpt2(find_base("mini")[1]).named_parameters())
    base = weights["h.0.attn.c_attn.weight"].double()  # (out, in)
    torch.manual_seed(0)
    update = torch.randn(base.size(0), 8).double() @ torch.randn(8, base.size(1)).double()
    exponents = torch.linspace(-6, 0, 7 if args.short else 25)
    data = {"size": (10**exponents).tolist()}
    figure, axes = panels(2, "Merging: what is left of B A after W + B A is rounded (mini, c_attn)")
    for name, dtype in PRECISIONS.items():
        errors = [rounding(base, update * (size * rms(base) / rms(update)), dtype)
                  for size in data["size"]]
        data[name] = {"error": [e for e, _ in errors], "unmoved": [u for _, u in errors]}
        for axis, values in zip(axes, data[name].values(), strict=True):
            axis.plot(data["size"], [100 * value for value in values], ".-", color=COLOURS[name],
                      label=name)
    if (args.lora / WEIGHTS).is_file():
        data["adapter"] = [rms(update) / rms(weights[name])
                           for name, update in common.adapter_updates(args.lora).items()]
        for axis in axes:
            axis.axvspan(min(data["adapter"]), max(data["adapter"]), color=YELLOW, alpha=0.35,
                         label="a trained adapter's layers")
    for axis, title in zip(axes, ("error, % of the update's norm", "weights that do not move, %"),
                           strict=True):
        axis.set(xscale="log", xlabel="size of the update: rms(B A) / rms(W)", title=title)
    axes[0].set_yscale("log")
    axes[0].axhline(100, color="black", linewidth=0.8)
    axes[0].text(1, 120, "nothing left", ha="right", va="bottom", fontsize=8)
    axes[0].legend()
    save(args, "merge_error", data, figure)
    for i in range(0, len(exponents), max(1, len(exponents) // 6)):
        print(f"size {data['size'][i]:.0e}: " + "; ".join(
            f"{name} error {data[name]['error'][i]:.2%}, unmoved {data[name]['unmoved'][i]:.0%}"
            for name in PRECISIONS))
    return data


if __name__ == "__main__":
    main()
