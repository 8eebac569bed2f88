"""Checks of models: which layers are adapted, tied heads, checkpointing, compiling, copies."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_conformance.bench import (
    Implementation,
    expect,
    interface,
    mathematics,
    may_refuse,
    robustness,
)
from lora_conformance.models import (
    Model,
    adapted,
    changed,
    draw,
    expect_same,
    factors,
    off_by,
    others,
    stretch,
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


@robustness("A target matches any name that contains or ends in the target.", "peft #3755")
def targets_match_whole_names(lora: Implementation) -> None:
    """The target proj adapts h.0.proj, and not h.0.c_proj."""
    expect_adapted(lora, [f"transformer.h.{i}.proj" for i in range(4)], 4)


@interface("A target that matches nothing is ignored, if another target matches.", "peft #3554")
def every_target_matches(lora: Implementation) -> None:
    """If one of several targets matches no layer, this is refused, or a warning is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with may_refuse():
            lora.inject(Model(), ["proj", "q_proj"], 4, 12)
    expect(caught, "a target that matches no layer is ignored without a warning")


@robustness("Block 1 matches the first digit of 10 and 11.")
def blocks_match_whole_numbers(lora: Implementation) -> None:
    """With layers=[1], block 1 of twelve is adapted, and not 10 or 11."""
    expect_adapted(lora, ["transformer.h.1.proj"], 12, layers=[1])


@mathematics(
    "A layer with another rank is scaled by the common r.", "diffusers #14409", "peft #2194"
)
def ranks_and_alphas_by_layer(lora: Implementation) -> None:
    """With ranks and alphas, each layer is scaled by the alpha and the rank of that layer."""
    expect_ranks(lora, 1)


@mathematics("rsLoRA is ignored, or takes the root of the common rank.", "vLLM #55545")
def rslora_with_ranks_by_layer(lora: Implementation) -> None:
    """With ranks, alphas and use_rslora, each layer is scaled by alpha / sqrt(r) of that layer."""
    expect_ranks(lora, 0.5, use_rslora=True)


def expect_ranks(lora: Implementation, power: float, **options: bool) -> None:
    base = Model(12)
    model = deepcopy(base)
    settings = {"ranks": {"h.1.proj": 2, "h.2.proj": 2}, "alphas": {"h.1.proj": 10, "h.3.proj": 20}}
    lora.inject(model, ["proj"], 4, 12, **settings, **options)
    draw(*trained(model))
    model.double()
    for i, (r, alpha) in {0: (4, 12), 1: (2, 10), 2: (2, 12), 3: (4, 20), 11: (4, 12)}.items():
        layer = model.blocks()[i].proj
        a, b = factors(lora, layer, r)
        expect(len(a) == r, f"h.{i}.proj has rank {len(a)}, not {r}")
        expected = base.blocks()[i].proj.weight.double() + alpha / r**power * b @ a
        expect_same(weight_of(layer, 8), expected, f"the weight of h.{i}.proj", 1e-6)


@mathematics("inject ignores use_dora.")
def inject_makes_dora_layers(lora: Implementation) -> None:
    """With use_dora, every layer that inject adapts is m / ||V|| V."""
    base = Model()
    model = deepcopy(base)
    lora.inject(model, ["proj"], 4, 12, use_dora=True)
    for i, block in enumerate(model.double().blocks()):
        known = lora.factors(block.proj)
        draw(*known)
        magnitudes = others(block.proj, *known)
        expect(len(magnitudes) == 1, f"h.{i}.proj has {len(magnitudes)} magnitudes, not one")
        stretch(magnitudes)
        a, b = factors(lora, block.proj, 4)
        v = base.blocks()[i].proj.weight.double() + 3 * b @ a
        expected = magnitudes[0].view(-1, 1) / v.norm(dim=1, keepdim=True) * v
        expect_same(weight_of(block.proj, 8), expected, f"the weight of h.{i}.proj", 1e-5)


@mathematics("Merging or unmerging a model skips layers.")
def every_layer_of_a_model_is_merged(lora: Implementation) -> None:
    """Merging a model moves every layer's update into W, and unmerging takes every update out."""
    base = Model()
    model = deepcopy(base)
    handle = lora.inject(model, ["proj", "c_proj"], 4, 12)
    draw(*trained(model))
    ids = torch.arange(17)[None]
    expected = model(ids).detach()
    layers = [layer for block in model.blocks() for layer in (block.proj, block.c_proj)]
    bs = [lora.factors(layer)[1] for layer in layers]
    lora.merge(handle)
    expect_same(model(ids), expected, "the merged output", 1e-5)
    with changed(*bs):
        expect_same(model(ids), expected, "the merged output, after a change of every B,", 1e-5)
    lora.unmerge(handle)
    expect_same(model(ids), expected, "the unmerged output", 1e-5)
    draw(*(a for layer in layers for a in lora.factors(layer)[:1]))
    for b in (lora.factors(layer)[1] for layer in layers):
        b.data.zero_()
    expect_same(model(ids), base(ids), "the unmerged output without updates", 1e-5)


@robustness(
    "Merging a head that shares the embedding's weight changes the embedding.", "peft #2972"
)
def tied_head(lora: Implementation) -> None:
    """Adapting a head tied to the embedding is refused, or warned of, or spares the embedding."""
    model = Model()
    with expect_spared(model), may_refuse():
        handle = lora.inject(model, ["lm_head"], 4, 12)
        draw(*trained(model))
        lora.merge(handle)


@robustness("Loading skips the test for a tied head, and merging changes the embedding.")
def tied_head_of_a_loaded_adapter(lora: Implementation) -> None:
    """An adapter of a head is refused by a tied head, or warned of, or spares the embedding."""
    model, tied = Model(tied=False), Model()
    with TemporaryDirectory() as directory:
        path = Path(directory) / "adapter"
        with may_refuse():
            handle = lora.inject(model, ["lm_head"], 4, 12)
        draw(*trained(model))
        lora.save(handle, path)
        with expect_spared(tied), may_refuse():
            lora.merge(lora.load(tied, path, targets=["lm_head"], r=4, alpha=12))


@contextmanager
def expect_spared(model: Model) -> Iterator[None]:
    embedding = model.embed_tokens.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    moved = off_by(model.embed_tokens.weight, embedding)
    expect(moved == 0 or caught, f"merging the head moves the embedding by {moved:.0%}")


@robustness(
    "The mask is not from PyTorch's generator, so the second forward pass draws another mask."
)
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


@robustness("The forward pass reads a value of a tensor, or changes an attribute.")
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


@robustness("A patched forward uses the parameters of the original.")
def a_copy_is_independent(lora: Implementation) -> None:
    """A deepcopy computes with a separate A and B."""
    one = adapted(lora)
    before = one.weight()
    copied = deepcopy(one.layer)
    a, b = factors(lora, copied, 4)
    b.data *= 2
    expect_same(weight_of(one.layer, 12), before, "the original, after a change of the copy")
    expect_same(weight_of(copied, 12), one._replace(a=a, b=b).weight(), "the copy's weight")
