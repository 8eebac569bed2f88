"""Checks of models: which layers are adapted, tied heads, checkpointing, compiling, copies."""

import warnings
from copy import deepcopy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_conformance.bench import Implementation, check, expect
from lora_conformance.models import (
    Model,
    adapted,
    draw,
    expect_same,
    factors,
    off_by,
    trained,
    weight_of,
)


def adapted_names(model: Model, base: Model) -> list[str]:
    """Return the names of the linear layers whose outputs differ from the base."""
    names = []
    for name, linear in base.named_modules():
        if isinstance(linear, nn.Linear):
            x = torch.randn(5, linear.in_features)
            if off_by(model.get_submodule(name)(x), linear(x)) > 1e-4:
                names.append(name)
    return names


def expect_adapted(lora: Implementation, expected: list[str], blocks: int, **options) -> None:
    base = Model(blocks)
    model = deepcopy(base)
    lora.inject(model, ["proj"], 4, 12, **options)
    draw(*trained(model))
    names = adapted_names(model, base)
    expect(names == expected, f"adapted are {', '.join(names)}, not {', '.join(expected)}")


@check("A target matches any name that contains or ends in the target.", "peft #3755")
def targets_match_whole_names(lora: Implementation) -> None:
    """The target proj adapts h.0.proj, and not h.0.c_proj."""
    expect_adapted(lora, ["transformer.h.0.proj", "transformer.h.1.proj"], 2)


@check("A target that matches nothing is ignored, if another target matches.", "peft #3554")
def every_target_matches(lora: Implementation) -> None:
    """If one of several targets matches no layer, this is refused, or a warning is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lora.inject(Model(), ["proj", "q_proj"], 4, 12)
        except (ValueError, RuntimeError):
            return
    expect(caught, "a target that matches no layer is ignored without a warning")


@check("Block 1 matches the first digit of 10 and 11.")
def blocks_match_whole_numbers(lora: Implementation) -> None:
    """With layers=[1], block 1 of twelve is adapted, and not 10 or 11."""
    expect_adapted(lora, ["transformer.h.1.proj"], 12, layers=[1])


@check("A layer with another rank is scaled by the common r.", "diffusers #14409")
def ranks_and_alphas_by_layer(lora: Implementation) -> None:
    """With ranks and alphas, each layer is scaled by the alpha and the rank of that layer."""
    base = Model(3)
    model = deepcopy(base)
    special = {"h.1.proj": 2, "h.2.proj": 2}
    lora.inject(model, ["proj"], 4, 12, ranks=special, alphas={"h.1.proj": 10})
    draw(*trained(model))
    model.double()
    for i, (r, scaling) in enumerate(((4, 3), (2, 5), (2, 6))):
        layer = model.blocks()[i].proj
        a, b = factors(lora, layer, r)
        expect(len(a) == r, f"h.{i}.proj has rank {len(a)}, not {r}")
        expected = base.blocks()[i].proj.weight.double() + scaling * b @ a
        expect_same(weight_of(layer, 8), expected, f"the weight of h.{i}.proj", 1e-6)


@check("Merging a head that shares the embedding's weight changes the embedding.", "peft #2972")
def tied_head(lora: Implementation) -> None:
    """Adapting a head tied to the embedding is refused, or warned of, or spares the embedding."""
    model = Model()
    embedding = model.embed_tokens.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            handle = lora.inject(model, ["lm_head"], 4, 12)
            draw(*trained(model))
            lora.merge(handle)
        except (ValueError, RuntimeError):
            return
    moved = off_by(model.embed_tokens.weight, embedding)
    expect(moved == 0 or caught, f"merging the head moves the embedding by {moved:.0%}")


@check("The mask is not from PyTorch's generator, so the second forward pass draws another mask.")
def gradient_checkpointing(lora: Implementation) -> None:
    """Gradients with dropout are the same with gradient checkpointing."""
    layer = adapted(lora, dropout=0.5).layer
    x = torch.randn(5, 12).double().requires_grad_()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(run(x).square().sum(), [x, *trained(layer)]))
    for plain, checkpointed in zip(*found, strict=True):
        expect_same(checkpointed, plain, "a gradient")


@check("The forward pass reads a value of a tensor, or changes an attribute.")
def compiles_once(lora: Implementation) -> None:
    """torch.compile makes one graph, without breaks, and steps do not compile again."""
    from torch._dynamo.testing import CompileCounter  # slow to import

    layer = adapted(lora).layer
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        x = torch.randn(5, 12).double()
        expect_same(compiled(x), layer(x), "the compiled output")
        draw(*trained(layer))
    expect(counter.frame_count == 1, f"three steps compile {counter.frame_count} times")


@check("A patched forward uses the parameters of the original.")
def a_copy_is_independent(lora: Implementation) -> None:
    """A deepcopy computes with a separate A and B."""
    one = adapted(lora)
    before = one.weight()
    copied = deepcopy(one.layer)
    a, b = factors(lora, copied, 4)
    b.data *= 2
    expect_same(weight_of(one.layer, 12), before, "the original, after a change of the copy")
    expected = one._replace(a=a, b=b).weight()
    expect_same(weight_of(copied, 12), expected, "the copy's weight")
