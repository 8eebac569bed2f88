"""Checks of slices: q, k or v of a layer that computes all three."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from lora_conformance.bench import Implementation, expect, mathematics, may_refuse
from lora_conformance.models import (
    adapted,
    draw,
    expect_merges_and_unmerges,
    expect_same,
    others,
    stretch,
    trained,
    weight_of,
)


@mathematics(
    "A slice's update goes to the rows of another slice, or the update has another scaling.",
    "litgpt #2201",
    "lit-llama #185",
)
def slices_of_a_fused_layer(lora: Implementation) -> None:
    """With slices, q, k and v of a fused layer get separate updates, or none, merged or not."""
    for slices in ((0, 2), (0, 1), (1,)):
        expect_slices(lora, slices, (8, 8, 8))


@mathematics(
    "q, k and v are taken for thirds, although q is wider.", "litgpt #900", "Megatron-Bridge #1818"
)
def slices_of_unequal_widths(lora: Implementation) -> None:
    """With slices and widths, q, k and v may have different widths, as with grouped queries."""
    for slices in ((0, 2), (0, 1, 2)):
        expect_slices(lora, slices, (16, 8, 8), told=True)


@mathematics("Slices are scaled by alpha / r, although the layer is told to use rsLoRA.")
def slices_with_rslora(lora: Implementation) -> None:
    """With slices and use_rslora, each slice's update is alpha / sqrt(r) * B A x."""
    expect_slices(lora, (0, 2), (8, 8, 8), use_rslora=True)


@mathematics("DoRA's magnitudes go to the rows of another slice, or scale rows without an update.")
def slices_with_dora(lora: Implementation) -> None:
    """With slices and use_dora, the adapted rows are m / ||V|| V, and the other rows are W."""
    with may_refuse():
        lora.wrap(nn.Linear(12, 24), 2, 6, 0.0, slices=(0, 2), use_dora=True)
    expect_slices(lora, (0, 2), (8, 8, 8), use_dora=True)


@mathematics("Slices ignore dropout, or drop elements of A x.")
def slices_with_dropout(lora: Implementation) -> None:
    """With slices, dropout of 0.2 removes elements of x before A, in training only."""
    base = nn.Linear(12, 24)
    layer = lora.wrap(deepcopy(base), 2, 6, 0.2, slices=(0, 2)).double()
    layer.train()
    base.double()
    draw(*trained(layer))
    x = torch.zeros(4000, 12).double()
    x[:, 0] = 1  # dropout removes this element, or not
    dropped = [rows.detach() for rows in (layer(x) - base(x)).split(8, dim=1)]
    layer.eval()
    whole = [rows.detach() for rows in (layer(x) - base(x)).split(8, dim=1)]
    for name, found, expected in zip("qkv", dropped, whole, strict=True):
        sizes = found.norm(dim=1).round(decimals=4).unique()
        count = 1 if name == "k" else 2
        expect(len(sizes) == count, f"the update of {name} has {len(sizes)} sizes, not {count}")
        mean = found.mean(0) - expected[0]
        expect(mean.norm() < 0.05 * (expected[0].norm() + 1e-6), f"{name}'s mean update is wrong")


def expect_slices(
    lora: Implementation,
    slices: Sequence[int],
    widths: Sequence[int],
    told: bool = False,
    **options: bool,
) -> None:
    given = options | ({"widths": widths} if told else {})
    scaling = adapted(lora, r=2, alpha=6).scaling * (2**0.5 if "use_rslora" in options else 1)
    base = nn.Linear(12, sum(widths))
    layer = lora.wrap(deepcopy(base), 2, 6, 0.0, slices=slices, **given).double()
    base.double().requires_grad_(False)
    draw(*(lora.factors(layer) if options.get("use_dora") else trained(layer)))
    magnitudes: list[Tensor] = []
    if options.get("use_dora"):
        [m] = others(layer, *lora.factors(layer))
        magnitudes = list(m.detach().view(-1).split(8))  # of the adapted slices, or of all
        if len(magnitudes) > len(slices):
            magnitudes = [magnitudes[i] for i in slices]
        stretch(magnitudes)
    expected = [rows.clone() for rows in base.weight.split(list(widths))]
    for i, (place, a, b) in enumerate(slice_factors(lora, layer, slices, widths)):
        v = expected[place] + scaling * b @ a
        expected[place] = (magnitudes[i] / v.norm(dim=1))[:, None] * v if magnitudes else v
    found = weight_of(layer, 12).split(list(widths))
    for name, rows, wanted in zip("qkv", found, expected, strict=True):
        expect_same(rows, wanted, f"the weight of {name} with slices={slices}", 1e-5)
    if not magnitudes:
        expect_merges_and_unmerges(lora, layer, base, f"slices={slices}")


def slice_factors(
    lora: Implementation, layer: nn.Module, slices: Sequence[int], widths: Sequence[int]
) -> list[tuple[int, Tensor, Tensor]]:
    """Return the number, A (r, in) and B (width, r) of each adapted slice. The rank is 2."""
    a, b = (factor.detach() for factor in lora.factors(layer))
    own = [widths[i] for i in slices]
    if b.numel() == 2 * sum(own):
        bs = b.reshape(-1, 2).split(own)
    else:  # a whole layer's B, which is zero outside the blocks
        rows = b.split(list(widths))
        bs = tuple(rows[place][:, 2 * i : 2 * i + 2] for i, place in enumerate(slices))
    return list(zip(slices, a.reshape(-1, a.size(-1)).split(2), bs, strict=True))
