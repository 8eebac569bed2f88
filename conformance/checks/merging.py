"""Checks of merging: once, twice and back, in bf16, and into other layouts of W."""

from contextlib import suppress
from copy import deepcopy

import torch
from torch import Tensor, nn

from conformance.bench import Implementation, check, expect
from conformance.models import InOutLinear, adapted, draw, expect_same, factors, trained, weight_of


@check("A merged layer still adds the update, so the update counts twice.", "candle-lora #26")
def merging_keeps_the_output(lora: Implementation) -> None:
    """Merging does not change the output of a layer."""
    one = adapted(lora)
    lora.merge(one.layer)
    expect_same(weight_of(one.layer, 12), one.weight(), "the merged weight", 1e-6)


@check("The layer does not know that it is merged, so a second merge adds again.")
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


@check("Unmerging subtracts another update than merging added.")
def unmerging_restores_the_base(lora: Implementation) -> None:
    """After merging and unmerging, the base and the update are unchanged."""
    one = adapted(lora)
    lora.merge(one.layer)
    lora.unmerge(one.layer)
    one.b.data *= 2
    expect_same(weight_of(one.layer, 12), one.weight(), "the weight, with B doubled since", 1e-6)


@check("eval() merges although the layer is merged, or returns nothing.")
def eval_and_train_keep_the_output(lora: Implementation) -> None:
    """eval() and train(), in any order and more than once, change no output without dropout."""
    layer = adapted(lora).layer
    model = nn.Sequential(layer)
    x = torch.randn(5, 12).double()
    expected = model(x).detach()
    for mode in (False, False, True, True, False, True):
        model.train(mode)
        expect_same(model(x), expected, f"the output after train({mode})", 1e-6)
    expect(layer.eval() is layer, "eval() does not return the module")


def bf16_layer(lora: Implementation) -> tuple[nn.Module, Tensor, Tensor]:
    """Return an adapted bf16 layer without bias, and W and the update in fp64."""
    base = nn.Linear(16, 24, bias=False).bfloat16()
    layer = lora.wrap(deepcopy(base), 4, 12, 0.0)
    a, b = factors(lora, layer, 4)
    draw(a, b)
    return layer, base.weight.detach().double(), 3 * b.detach().double() @ a.detach().double()


@check("A and B are cast to bf16 before they are multiplied.", "peft #1388", "torchtune #1101")
def merging_into_bf16_rounds_once(lora: Implementation) -> None:
    """Merging into a bf16 base is refused, or W + update is computed in fp32 and rounded."""
    layer, weight, update = bf16_layer(lora)
    try:
        lora.merge(layer)
    except (ValueError, RuntimeError):
        return
    merged = weight_of(layer, 16, torch.bfloat16).double()
    step = 2.0**-8 * ((weight + update).abs() + update.abs())
    worst = ((merged - weight - update).abs() / step).max()
    expect(worst < 1.01, f"a merged weight is {worst:.1f} roundings off")


@check("Unmerging subtracts in bf16, so each merge and unmerge moves the base.")
def unmerging_from_bf16_restores_the_base(lora: Implementation) -> None:
    """Merging and unmerging a bf16 base is refused, or restores W bit for bit."""
    layer, weight, _ = bf16_layer(lora)
    try:
        lora.merge(layer)
        lora.unmerge(layer)
    except (ValueError, RuntimeError):
        return
    with torch.no_grad():
        for factor in lora.factors(layer):
            factor.zero_()
    moved = (weight_of(layer, 16, torch.bfloat16).double() != weight).double().mean()
    expect(moved == 0, f"{moved:.0%} of the base's weights have moved")


@check(
    "A state dict of a merged layer contains the merged W and also the update.",
    "microsoft/LoRA #190",
    "LoRA-Torch #10",
    "espnet #5722",
)
def state_dict_while_merged(lora: Implementation) -> None:
    """A state dict of a merged layer is refused, or gives a new layer with the same output."""
    base = nn.Linear(12, 20)
    layers = [lora.wrap(deepcopy(base), 4, 12, 0.0).double() for _ in range(2)]
    draw(*lora.factors(layers[0]))
    x = torch.randn(5, 12).double()
    expected = layers[0](x).detach()
    lora.merge(layers[0])
    try:
        layers[1].load_state_dict(layers[0].state_dict())
    except (ValueError, RuntimeError):
        return
    expect_same(layers[1](x), expected, "the output of a new layer that loads it", 1e-6)


@check("Unmerging divides by DoRA's factor along the wrong axis.", "peft #3531")
def dora_merges_and_unmerges(lora: Implementation) -> None:
    """A trained DoRA layer, square or not, merges and unmerges without a change."""
    for fan_out in (12, 20):
        layer = adapted(lora, fan_out=fan_out, use_dora=True).layer
        x = torch.randn(5, 12).double()
        expected = layer(x).detach()
        lora.merge(layer)
        expect_same(layer(x), expected, f"the merged output of (12, {fan_out})", 1e-5)
        lora.unmerge(layer)
        expect_same(layer(x), expected, f"the unmerged output of (12, {fan_out})", 1e-5)


@check("The update is not transposed for W (in, out). A square W hides this.", "peft #3531")
def in_out_weights(lora: Implementation) -> None:
    """With fan_in_fan_out, layers that store W as (in, out) are right, merged or not."""
    for fan_out in (12, 20):
        base = InOutLinear(12, fan_out)
        layer = lora.wrap(deepcopy(base), 4, 12, 0.0, fan_in_fan_out=True).double()
        a, b = factors(lora, layer, 4)
        draw(a, b)
        expected = base.weight.detach().double().T + 3 * b @ a
        expect_same(weight_of(layer, 12), expected, f"the weight of (12, {fan_out})", 1e-6)
        lora.merge(layer)
        expect_same(weight_of(layer, 12), expected, f"the merged (12, {fan_out})", 1e-6)


@check("A slice's update goes to the rows of another slice.", "litgpt #2201", "lit-llama #185")
def slices_of_a_fused_layer(lora: Implementation) -> None:
    """With slices=(0, 2), q and v of a fused layer get updates of rank r, and k gets none."""
    base = nn.Linear(12, 24)
    layer = lora.wrap(deepcopy(base), 2, 6, 0.0, slices=(0, 2)).double()
    draw(*trained(layer))
    weight = weight_of(layer, 12)
    update = (weight - base.weight.double()).detach()
    for name, rows, rank in (("q", update[:8], 2), ("k", update[8:16], 0), ("v", update[16:], 2)):
        found = int(torch.linalg.matrix_rank(rows, rtol=1e-6, atol=1e-6))
        expect(found == rank, f"the update of {name} has rank {found}, not {rank}")
    lora.merge(layer)
    expect_same(weight_of(layer, 12), weight, "the merged weight", 1e-6)
