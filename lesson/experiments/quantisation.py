"""What do four bits cost? `python -m lesson.experiments.quantisation`

Varied: the format of mini's frozen base: fp32, int8 with a scale per row, or NF4.
Fixed: the default book, LoRA of rank 8 on every linear layer, lr 4e-3, fp32 compute, 60 steps of 4
windows of 128 tokens.
Measured: the error of the weights by block size and by layer. Also the validation loss of each
base, of LoRA on each base (three seeds), and of the NF4 adapter after four ways of merging.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from common.figures import BASE, INK, LORA, PAGE_WIDTH, new_figure
from lesson.experiments.common import (
    SEEDS,
    Steps,
    add_texts,
    as_command,
    describe_seeds,
    experiment,
    spread,
    trainer,
)
from lesson.experiments.sweep import train
from lesson.figures import OTHER, draw_at, name_line, shades
from lora import lora_layers, merge, quantise, unwrap
from lora.quantised import (
    BLOCK,
    LAYERS,
    dequantise,
    nearest,
    nf4_levels,
    scaled_blocks,
)
from storage.hub import MINI
from storage.weights import load_gpt2

KINDS = ("fp32", "int8", "nf4")
NF4, EVEN_LEVELS, INT8 = shades(OTHER, 3)
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "stride": 128,
    "max_steps": 60,
    "lr": 4e-3,
    "target_modules": ("all-linear",),
}
BLOCK_SIZES = [2**k for k in range(3, 13)]
EVEN = torch.arange(-7, 8) / 7  # the 15 levels of a signed 4-bit integer


def linear_weights() -> dict[str, Tensor]:
    """Return the weight (out, in) of each linear layer in mini's blocks, by name."""
    modules = load_gpt2(MINI).named_modules()
    return {name: m.weight.detach() for name, m in modules if isinstance(m, nn.Linear)}


def relative_error(approximation: Tensor, weight: Tensor) -> float:
    """Return the norm of the error as a share of the weight's norm."""
    return ((approximation - weight).norm() / weight.norm()).item()


def rounded(weight: Tensor, levels: Tensor, block: int) -> Tensor:
    """Return W with each number rounded to the nearest level times the absmax of the block."""
    x, absmax = scaled_blocks(weight, block)
    values = levels[nearest(x, levels).long()] * absmax[:, None]
    return values.flatten()[: weight.numel()].view_as(weight)


def errors_by_block(weights: Mapping[str, Tensor], levels: Tensor) -> list[float]:
    """Return the mean relative error over the layers, for each of `BLOCK_SIZES`."""
    found = []
    for block in BLOCK_SIZES:
        errors = [relative_error(rounded(w, levels, block), w) for w in weights.values()]
        found.append(mean(errors))
    return found


def errors_by_layer(weights: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the relative error of each layer, in int8 and in NF4, by kind and name."""
    found: dict[str, dict[str, float]] = {}
    for kind, make in LAYERS.items():
        found[kind] = {}
        for name, weight in weights.items():
            layer = nn.Linear(weight.size(1), weight.size(0), bias=False)
            layer.weight.data = weight
            found[kind][name] = relative_error(make(layer).weight, weight)
    return found


def shares(weights: Mapping[str, Tensor], bins: int) -> list[float]:
    """Return the share of weights in each of `bins` bins of w / absmax, from -1 to 1."""
    counts = torch.zeros(bins)
    for weight in weights.values():
        x, _ = scaled_blocks(weight, BLOCK)
        counts += torch.histc(x, bins, -1, 1)
    return (counts / counts.sum()).tolist()


def losses(kind: str, seed: int) -> dict[str, float]:
    """Return the loss of a base in this format, and the loss after training an adapter on it."""
    options = dict(SETTINGS)
    if kind != "fp32":
        options["quantise"] = kind
    made = trainer("lora", seed, **options)
    found = {"base": made.evaluate().loss}
    train(made)
    found["trained"] = made.evaluate().loss
    if kind == "nf4":
        found |= merged_losses(made)
    print(kind, f"seed {seed}:", found, flush=True)
    return found


def merged_losses(made: Steps) -> dict[str, float]:
    """Merge a trained adapter in each way. Return each loss. Merging removes the adapter."""
    model = made.model
    dequantise(model)
    found = {}

    layers = lora_layers(model)
    kept = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    originals = linear_weights()
    for name, layer in layers.items():
        layer.base_layer.weight.data = originals[name].clone()
    merge(model)
    found["into the original base"] = made.evaluate().loss

    for name, layer in layers.items():
        layer.merged = False
        layer.base_layer.weight.data = kept[name]
    merge(model)
    unwrap(model)
    found["into the dequantised base"] = made.evaluate().loss

    quantise(model, "nf4")
    found["into NF4 again"] = made.evaluate().loss
    return found


def draw(data: dict[str, Any]) -> Any:
    """Draw the weights with the levels, the errors, and the losses."""
    figure = new_figure((PAGE_WIDTH, 6.8))
    caption = (
        "The linear layers of all blocks. Error: mean over the layers. LoRA: rank 8 on these "
        "layers, lr 4e-3, 60 steps of 4 windows of 128 tokens, "
        f"{describe_seeds(len(data['losses']['fp32']))}."
    )
    add_texts(figure, "Four bits for each frozen weight (mini)", caption)
    axes = figure.subplot_mosaic([["levels", "levels"], ["errors", "losses"]])
    draw_levels(axes["levels"], data["histogram"])
    draw_errors(axes["errors"], data)
    draw_losses(axes["losses"], data["losses"])
    return figure


def draw_levels(axis: Any, histogram: list[float]) -> None:
    """Draw the histogram of the weights, with NF4's levels above and int8's levels below."""
    height = 1.06 * max(histogram)
    width = 2 / len(histogram)
    middles = [-1 + width * (i + 0.5) for i in range(len(histogram))]
    axis.bar(middles, [100 * share for share in histogram], width, color=BASE, alpha=0.35)

    height *= 100
    axis.vlines(nf4_levels().tolist(), 0, height, color=NF4, linewidth=1.5)
    int8 = (torch.arange(-127, 128) / 127).tolist()
    axis.vlines(int8, -0.12 * height, -0.02 * height, color=INT8, linewidth=0.6)
    name_line(axis, "NF4:\n16 levels", (-1, 0.9 * height), NF4)
    name_line(axis, "int8: 255\nlevels", (1, -0.07 * height), INT8)
    axis.set(
        xlabel=f"weight / largest size in its block of {BLOCK} weights (int8: row)",
        ylim=(-0.15 * height, 1.05 * height),
    )
    axis.set_title("% of the weights per bar, and the levels that they round to")
    axis.grid(visible=False)


def draw_errors(axis: Any, data: dict[str, Any]) -> None:
    """Draw the error of the weights by block size, for both kinds of four bits and for int8."""
    for label, colour in (("NF4", NF4), ("even levels", EVEN_LEVELS)):
        percent = [100 * error for error in data["error by block size"][label]]
        axis.plot(BLOCK_SIZES, percent, ".-", color=colour)
        name_line(
            axis, f"4 bits, {label}", (BLOCK_SIZES[-1], percent[-1]), colour, (-4, 8), "right"
        )
    int8 = mean(100 * error for error in data["error by layer"]["int8"].values())
    axis.axhline(int8, color=INT8)
    name_line(axis, "int8, a scale per row", (BLOCK_SIZES[-1], int8), INT8, (0, 8), "right")
    axis.axvline(BLOCK, color=INK, linestyle=":", linewidth=1)
    name_line(axis, f"NF4's block: {BLOCK}", (BLOCK, 20), INK, (-5, 0), "right")
    axis.set_xscale("log", base=2)
    draw_at(axis.xaxis, BLOCK_SIZES[::3])
    axis.set(xlabel="weights that share a scale", ylim=(0, 24))
    axis.set_title("error, % of the weights' norm")


def draw_losses(axis: Any, losses: dict[str, list[dict[str, float]]]) -> None:
    """Draw the loss of each base, and of LoRA on each base by seed, relative to fp32."""
    kinds = KINDS[1:]
    for what, words, colour, side in (
        ("base", "the base", BASE, -1),
        ("trained", "LoRA on it, by seed", LORA, 1),
    ):
        for row, kind in enumerate(kinds):
            pairs = zip(losses[kind], losses["fp32"], strict=True)
            extra = [1000 * (run[what] - fp32[what]) for run, fp32 in pairs]
            axis.plot(extra, [row + 0.12 * side] * len(extra), "o", color=colour, alpha=0.6)
        name_line(axis, words, (mean(extra), row + 0.26 * side), colour, (0, 0), "center")
    axis.axvline(0, color=INK, linestyle=":", linewidth=1)
    axis.set(yticks=range(len(kinds)), yticklabels=kinds, ylim=(len(kinds) - 0.5, -0.5))
    axis.set(xmargin=0.2, xlabel="thousandths of a nat per token")
    axis.set_title("validation loss minus fp32's, same seed")


def measure() -> dict[str, Any]:
    weights = linear_weights()
    data: dict[str, Any] = {
        "histogram": shares(weights, 81),
        "block sizes": BLOCK_SIZES,
        "error by block size": {
            "NF4": errors_by_block(weights, nf4_levels()),
            "even levels": errors_by_block(weights, EVEN),
        },
        "error by layer": errors_by_layer(weights),
        "losses": {},
    }
    for kind in KINDS:
        data["losses"][kind] = [losses(kind, seed) for seed in SEEDS]
    for kind, found in data["losses"].items():
        for what in found[0]:
            print(f"{kind}, {what}: {spread([run[what] for run in found], 4)}")
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("quantisation", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
