"""Checks of merging: once, twice and back, in bf16, and into other layouts of W."""

from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lora_conformance import vectors
from lora_conformance.bench import (
    Implementation,
    Missing,
    expect,
    interface,
    mathematics,
    may_refuse,
    robustness,
)
from lora_conformance.models import (
    DORA,
    IN_OUT,
    PLAIN,
    RSLORA,
    SLICES,
    InOutLinear,
    Options,
    adapted,
    base_for,
    changed,
    draw,
    expect_merges_and_unmerges,
    expect_same,
    factors,
    for_each,
    named,
    others,
    stretch,
    supported,
    trained,
    weight_of,
)


@mathematics(
    "A merged layer still adds the update or drops elements of x, or loses the bias.",
    "candle-lora #26",
)
def merging_keeps_the_output(lora: Implementation) -> None:
    """Merging does not change the output of a layer, in training without dropout."""
    scaling = adapted(lora).scaling
    for dropout in (0.0, 0.5):
        one = adapted(lora, dropout=dropout)._replace(scaling=scaling)
        lora.merge(one.layer)
        x = torch.randn(5, 12).double()
        expected = x @ one.weight().T + one.base.bias
        expect_same(one.layer(x), expected, f"the merged output with dropout={dropout}", 1e-6)


@mathematics(
    "The merge does nothing, and the layer goes on adding the update.",
    "diffusers #12007",
    "trl #386",
    "mlx-examples #425",
)
def merging_moves_the_update_into_w(lora: Implementation) -> None:
    """Once merged, the output of a layer of any kind does not depend on A and B."""
    kinds = (PLAIN, RSLORA, DORA, DORA | RSLORA, IN_OUT, DORA | IN_OUT, SLICES, DORA | SLICES)
    for options in supported(lora, *kinds):
        for dtype in (torch.float32, torch.bfloat16):
            with suppress(Missing, *(() if options == PLAIN else (ValueError, RuntimeError))):
                expect_moves(lora, dtype, options)


def expect_moves(lora: Implementation, dtype: torch.dtype, options: Options) -> None:
    layer = lora.wrap(base_for(options).to(dtype), 4, 12, 0.0, **options)
    draw(*(parameters := trained(layer)))
    x = torch.randn(5, 12).to(dtype)
    try:
        lora.merge(layer)
    except (ValueError, RuntimeError):
        if dtype is torch.float32:
            raise
        return
    merged = layer(x)
    with changed(*parameters):
        what = f"the merged output of {named(options)} in {dtype}, after a change of A and B,"
        expect_same(layer(x), merged, what)


@robustness("Merging or unmerging replaces W by a new parameter, which is then trained.")
def merging_keeps_the_base_frozen(lora: Implementation) -> None:
    """After merging, and after unmerging, W is not trained."""
    for options in supported(lora, PLAIN, DORA):
        layer = adapted(lora, **options).layer
        allowed = {id(parameter) for parameter in trained(layer)}
        for name in ("merge", "unmerge"):
            if not lora.has(name):
                continue
            getattr(lora, name)(layer)
            new = [p for p in trained(layer) if id(p) not in allowed]
            expect(not new, f"{named(options)}: {name} makes {len(new)} parameters trainable")


@mathematics("Merging computes the scaling of rsLoRA again, as alpha / r.")
def rslora_merges_and_unmerges(lora: Implementation) -> None:
    """An rsLoRA layer merges and unmerges without a change."""
    one = adapted(lora, use_rslora=True)
    expect_merges_and_unmerges(lora, one.layer, one.base, "rsLoRA")


@robustness("The layer does not know that it is merged, so a second merge adds again.")
def merging_twice_is_merging_once(lora: Implementation) -> None:
    """A second merge, or a second unmerge, changes nothing or is refused."""
    one = adapted(lora)
    for name in ("merge", "unmerge"):
        change = getattr(lora, name)
        change(one.layer)
        with suppress(ValueError, RuntimeError):
            change(one.layer)
        weight = weight_of(one.layer, 12)
        expect_same(weight, one.weight(), f"the weight after a second {name}", 1e-6)


@mathematics("Unmerging subtracts another update than merging added.")
def unmerging_restores_the_base(lora: Implementation) -> None:
    """After merging and unmerging, the base and the update are unchanged."""
    one = adapted(lora)
    lora.merge(one.layer)
    lora.unmerge(one.layer)
    one.b.data *= 2
    expect_same(weight_of(one.layer, 12), one.weight(), "the weight, with B doubled since", 1e-6)


@mathematics("Merging adds an update that was computed for an earlier merge.")
def merging_again_adds_the_new_update(lora: Implementation) -> None:
    """If A or B changes after a merge and an unmerge, the next merge adds the changed update."""
    one = adapted(lora)
    lora.merge(one.layer)
    lora.unmerge(one.layer)
    one.b.data *= 2
    lora.merge(one.layer)
    expect_same(weight_of(one.layer, 12), one.weight(), "the weight, merged again", 1e-6)


@robustness("eval() merges although the layer is merged, or returns nothing.")
def eval_and_train_keep_the_output(lora: Implementation) -> None:
    """eval() and train(), in any order and more than once, change no output without dropout."""
    for options in supported(lora, PLAIN, DORA):
        layer = adapted(lora, **options).layer
        model = nn.Sequential(layer)
        x = torch.randn(5, 12).double()
        expected = model(x).detach()
        for mode in (False, False, True, True, False, True):
            model.train(mode)
            what = f"the output of {named(options)} after train({mode})"
            expect_same(model(x), expected, what, 1e-6)
        expect(layer.eval() is layer, "eval() does not return the module")


def bf16_layer(lora: Implementation, **options: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Return an adapted bf16 layer without bias, and W and the update in fp64. The scaling is the
    scaling of an fp64 layer.
    """
    scaling = adapted(lora, bias=False).scaling
    base = nn.Linear(16, 24, bias=False).bfloat16()
    layer = lora.wrap(deepcopy(base), 4, 12, 0.0, **options)
    a, b = factors(lora, layer, 4)
    draw(a, b)
    weight = base.weight.detach().double()
    update = scaling * b.detach().double() @ a.detach().double()
    if options.get("use_dora"):
        [magnitude] = others(layer, a, b)
        stretch([magnitude])
        v = weight + update
        factor = magnitude.detach().double().view(-1, 1) / v.norm(dim=1, keepdim=True)
        update = factor * v - weight
    return layer, weight, update


@robustness("A and B are cast to bf16 before they are multiplied.", "peft #1388", "torchtune #1101")
def merging_into_bf16_rounds_once(lora: Implementation) -> None:
    """Merging into a bf16 base is refused, or W + update is computed in fp32 and rounded once."""

    def merge(options: Options) -> None:
        layer, weight, update = bf16_layer(lora, **options)
        with may_refuse():
            lora.merge(layer)
        once = (weight + update).bfloat16()
        wrong = (weight_of(layer, 16, torch.bfloat16) != once).double().mean()
        expect(wrong < 0.01, f"{named(options)}: {wrong:.0%} of W are not rounded once")

    for_each(supported(lora, PLAIN, DORA), merge)


@robustness("Unmerging subtracts in bf16, so each merge and unmerge moves the base.")
def unmerging_from_bf16_restores_the_base(lora: Implementation) -> None:
    """Merging and unmerging a bf16 base is refused, or restores W bit for bit."""
    layer, weight, _ = bf16_layer(lora)
    with may_refuse():
        lora.merge(layer)
        lora.unmerge(layer)
    with torch.no_grad():
        for factor in lora.factors(layer):
            factor.zero_()
    moved = (weight_of(layer, 16, torch.bfloat16).double() != weight).double().mean()
    expect(moved == 0, f"{moved:.0%} of the base's weights have moved")


@interface(
    "A state dict of a merged layer contains the merged W and also the update.",
    "microsoft/LoRA #190",
    "LoRA-Torch #10",
    "espnet #5722",
)
def state_dict_while_merged(lora: Implementation) -> None:
    """A state dict of a merged layer is refused, or gives a new layer with the same output."""

    def load(options: Options) -> None:
        base = nn.Linear(12, 20)
        layers = [lora.wrap(deepcopy(base), 4, 12, 0.0, **options).double() for _ in range(2)]
        draw(*lora.factors(layers[0]))
        x = torch.randn(5, 12).double()
        expected = layers[0](x).detach()
        lora.merge(layers[0])
        with may_refuse():
            layers[1].load_state_dict(layers[0].state_dict())
        what = f"the output of a new {named(options)} layer that loads it"
        expect_same(layers[1](x), expected, what, 1e-6)

    for_each(supported(lora, PLAIN, DORA), load)


@mathematics("Unmerging divides by DoRA's factor along the wrong axis.", "peft #3531")
def dora_merges_and_unmerges(lora: Implementation) -> None:
    """A trained DoRA layer, square or not, merges and unmerges without a change."""
    for options in supported(lora, DORA, DORA | RSLORA, DORA | IN_OUT):
        for fan_out in (12, 24):
            base: Any = base_for(options, fan_out)
            layer = lora.wrap(deepcopy(base), 4, 12, 0.5, **options).double()
            layer.eval()
            draw(*(known := lora.factors(layer)))
            stretch(others(layer, *known))
            what = f"{named(options)}, (12, {fan_out})"
            expect_merges_and_unmerges(lora, layer, base.double(), what, use_dora=True)


@mathematics("The update is not transposed for W (in, out). A square W hides this.", "peft #3531")
def in_out_weights(lora: Implementation) -> None:
    """With fan_in_fan_out, layers that store W as (in, out) are right, merged or not."""
    scaling = adapted(lora).scaling
    for fan_out in (12, 20):
        base = InOutLinear(12, fan_out)
        layer = lora.wrap(deepcopy(base), 4, 12, 0.0, fan_in_fan_out=True).double()
        base.double()
        a, b = factors(lora, layer, 4)
        draw(a, b)
        expected = base.weight.T + scaling * b @ a
        expect_same(weight_of(layer, 12), expected, f"the weight of (12, {fan_out})", 1e-6)
        expect_merges_and_unmerges(lora, layer, base, f"(12, {fan_out})")


def round_to_nf4(weight: Tensor) -> Tensor:
    """Return the nearest numbers of NF4: levels times the largest magnitude of 64 numbers."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(vectors.index()["nf4_levels"], dtype=weight.dtype)
    nearest = ((blocks / largest)[:, :, None] - levels).abs().argmin(2)
    return (levels[nearest] * largest).view_as(weight)


@robustness("NF4 has other levels, or its blocks run down the columns of W.")
def nf4_keeps_its_numbers(lora: Implementation) -> None:
    """A W of NF4 numbers, in blocks of 64 along the rows, is the same in an NF4 layer."""
    base = nn.Linear(64, 64, bias=False)
    sizes = torch.linspace(0.1, 1, 64)[:, None]  # rows of other sizes, so their blocks differ
    base.weight.data = round_to_nf4(torch.randn(64, 64) * sizes)
    layer = lora.wrap(deepcopy(base), 4, 12, 0.0, nf4=True)
    lora.factors(layer)[1].data.zero_()
    expect_same(weight_of(layer, 64, torch.float32), base.weight, "the weight", 0.02)


@robustness("The sum is rounded to NF4 again, which erases most of the update.", "unsloth-zoo #810")
def merging_into_nf4_keeps_the_update(lora: Implementation) -> None:
    """Merging into an NF4 base is refused, or at least nine tenths of the update survive."""
    base = nn.Linear(64, 64, bias=False)
    base.weight.data = round_to_nf4(base.weight.data)
    layer = lora.wrap(deepcopy(base), 4, 12, 0.0, nf4=True)
    weight = weight_of(layer, 64, torch.float32)  # of a new adapter
    draw(*lora.factors(layer))
    lora.factors(layer)[0].data /= 400  # so the update is about a fiftieth of W
    update = weight_of(layer, 64, torch.float32) - weight
    with may_refuse():
        lora.merge(layer)
    change = weight_of(layer, 64, torch.float32) - weight
    share = (change * update).sum() / update.square().sum()
    expect(share > 0.9, f"{share:.0%} of the update survives")
    with changed(lora.factors(layer)[1]):
        again = weight_of(layer, 64, torch.float32) - weight
        expect_same(again, change, "the merged update, after a change of B,")
