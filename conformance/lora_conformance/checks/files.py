"""Checks of saved adapters."""

import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lora_conformance.bench import (
    Implementation,
    Missing,
    expect,
    interface,
    mathematics,
    may_refuse,
    robustness,
)
from lora_conformance.models import Model, draw, expect_same, off_by, trained

IDS = torch.arange(17)[None]
SETTINGS = {"targets": ["proj"], "r": 4, "alpha": 12}


def trained_adapter(
    lora: Implementation, base: Model, r: int = 4, alpha: float = 12, **options: Any
) -> tuple[Model, Any]:
    """Return a copy of the base with a random adapter, and the handle."""
    model = deepcopy(base)
    handle = lora.inject(model, ["proj"], r, alpha, **options)
    draw(*trained(model))
    return model, handle


@robustness(
    "The keys of a compiled model match nothing, and loading ignores that.",
    "nanoGPT #325",
    "ACE-Step #615",
    "vLLM #34186",
)
def saved_adapter_loads(lora: Implementation) -> None:
    """A saved adapter, also of a compiled model, loads to the same outputs or raises an error."""
    base = Model(12)  # h.1 is the beginning of h.11
    model, handle = trained_adapter(lora, base)
    expected = model(IDS)
    for kind, saved in (("a model", handle), ("a compiled model", torch.compile(handle))):
        fresh = deepcopy(base)
        with TemporaryDirectory() as directory:
            try:
                lora.save(saved, Path(directory) / "adapter")
                lora.load(fresh, Path(directory) / "adapter", **SETTINGS)
            except (ValueError, RuntimeError):
                if saved is handle:
                    raise
                return
        expect(off_by(fresh(IDS), base(IDS)) > 1e-6, f"the file of {kind} loads without an effect")
        expect_same(fresh(IDS), expected, f"the output with the file of {kind}", 1e-6)


@robustness("A loaded adapter is put on a base that was never frozen.", "mlx-vlm #2178")
def loading_freezes_the_base(lora: Implementation) -> None:
    """After injecting an adapter, or loading one, no weight of the base is trained."""
    model, fresh = Model(), Model()
    weights = {"injecting": list(model.parameters()), "loading": list(fresh.parameters())}
    handle = lora.inject(model, ["proj"], 4, 12)
    with TemporaryDirectory() as directory:
        lora.save(handle, Path(directory) / "adapter")
        lora.load(fresh, Path(directory) / "adapter", **SETTINGS)
    expect(fresh.lm_head.weight is fresh.embed_tokens.weight, "loading unties the head")
    for how, tensors in weights.items():
        found = sum(tensor.requires_grad for tensor in tensors)
        expect(not found, f"after {how}, {found} of the base's {len(tensors)} tensors are trained")


@robustness("The file lacks use_rslora, so loading scales by alpha / r.")
def rslora_is_saved(lora: Implementation) -> None:
    """An rsLoRA adapter has the same output after saving and loading."""
    expect_saved(lora, use_rslora=True)


@robustness("The file lacks the magnitude, or the magnitude is computed again.", "espnet #6425")
def dora_is_saved(lora: Implementation) -> None:
    """A DoRA adapter has the same output after train(), eval(), saving and loading."""
    expect_saved(lora, use_dora=True)


@robustness("The file has only parameters that require a gradient, so a frozen adapter is lost.")
def a_frozen_adapter_is_saved(lora: Implementation) -> None:
    """An adapter without requires_grad, as in evaluation, is saved like any other."""
    expect_saved(lora, frozen=True)


def expect_saved(lora: Implementation, frozen: bool = False, **options: bool) -> None:
    base = Model()
    fresh = deepcopy(base)
    model, handle = trained_adapter(lora, base, **options)
    if frozen:
        model.requires_grad_(False)
    expected = model(IDS).detach()
    model.train()
    model.eval()
    with TemporaryDirectory() as directory:
        lora.save(handle, Path(directory) / "adapter")
        lora.load(fresh, Path(directory) / "adapter", **SETTINGS, **options)
    for what, one in (("the saved model", model), ("the loaded model", fresh)):
        for mode in (True, False):
            one.train(mode)
            expect_same(one(IDS), expected, f"the output of {what} after train({mode})", 1e-5)


@robustness(
    "A file whose names match nothing loads without a warning.", "nanoGPT #325", "vLLM #34186"
)
def file_of_another_model_is_noticed(lora: Implementation) -> None:
    """A file whose names match nothing in the model is refused, or a warning is given."""
    _, handle = trained_adapter(lora, Model())
    with TemporaryDirectory() as directory, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.save(handle, Path(directory) / "adapter")
        try:
            lora.load(Model(name="layers"), Path(directory) / "adapter", **SETTINGS)
        except Missing:
            raise
        except Exception:
            return
    expect(caught, "a file that matches nothing loads without an error or a warning")


@robustness("Loading casts A and B to the base's precision, or the base to theirs.")
def loading_keeps_each_precision(lora: Implementation) -> None:
    """An fp32 adapter in a bf16 base stays fp32, bit for bit, and the base stays bf16."""
    base = Model()
    model, handle = trained_adapter(lora, base)
    fresh = deepcopy(base).bfloat16()
    weight = fresh.blocks()[0].c_proj.weight
    with TemporaryDirectory() as directory:
        lora.save(handle, Path(directory) / "adapter")
        with may_refuse():
            lora.load(fresh, Path(directory) / "adapter", **SETTINGS)
    expect(weight.dtype is torch.bfloat16, f"the base is {weight.dtype} after loading")
    pairs = map(lora.factors, (m.blocks()[3].proj for m in (fresh, model)))
    for name, found, saved in zip("AB", *pairs, strict=True):
        expect(found.dtype is torch.float32, f"the loaded {name} is {found.dtype}")
        expect_same(found, saved, f"the loaded {name}", 0)


@robustness("A file that is saved while the model is merged contains no update, or the merged W.")
def saving_while_merged(lora: Implementation) -> None:
    """Saving a merged model is refused, or the file gives a fresh base the same output."""
    base = Model()
    fresh = deepcopy(base)
    model, handle = trained_adapter(lora, base)
    expected = model(IDS).detach()
    lora.merge(handle)
    with TemporaryDirectory() as directory:
        with may_refuse():
            lora.save(handle, Path(directory) / "adapter")
        lora.load(fresh, Path(directory) / "adapter", **SETTINGS)
    expect_same(fresh(IDS), expected, "the output with a file of a merged model", 1e-5)


@interface("Saving sorts the patterns, and the first match counts.", "peft 0.21.2")
def patterns_keep_their_order(lora: Implementation) -> None:
    """Two patterns that match one layer have the same effect after saving and loading."""
    base = Model()
    alphas = {"h.0.proj": 48, "0.proj": 12}  # the first match counts
    model, handle = trained_adapter(lora, base, alphas=alphas)
    fresh = deepcopy(base)
    with TemporaryDirectory() as directory:
        lora.save(handle, Path(directory) / "adapter")
        lora.load(fresh, Path(directory) / "adapter", **SETTINGS, alphas=alphas)
    expect_same(fresh(IDS), model(IDS), "the output after loading", 1e-6)


@mathematics(
    "A weight loses the sign, A and B are summed apart, or every adapter gets the first alpha.",
    "peft #1907",
    "peft #3004",
)
def weighted_sum_with_a_negative_weight(lora: Implementation) -> None:
    """Three adapters add w1 D1 + w2 D2 + w3 D3, also if w2 < 0, with any ranks and alphas."""
    for ranks in ((4, 2, 2), (4, 4, 4)):
        expect_sum(lora, ranks)


@mathematics("The sum has only the layers of the first adapter, or adds updates of other layers.")
def weighted_sum_of_other_layers(lora: Implementation) -> None:
    """Adapters of different layers are refused, or each layer gets the sum of its updates."""
    expect_sum(lora, (4, 4, 4), ([0, 1], [1, 2], [3]))


@mathematics("The sum has the scaling of LoRA, alpha / r, or of another rank.", "peft #3761")
def weighted_sum_of_rslora(lora: Implementation) -> None:
    """A weighted sum of rsLoRA adapters is refused, or adds the updates."""
    expect_sum(lora, use_rslora=True)


@mathematics("The sum has the factors, and not the magnitudes.", "peft #3761")
def weighted_sum_of_dora(lora: Implementation) -> None:
    """A weighted sum of DoRA adapters is refused, or adds the updates."""
    expect_sum(lora, use_dora=True)


def expect_sum(
    lora: Implementation,
    ranks: tuple[int, ...] = (4, 2, 2),
    layers: tuple[list[int] | None, ...] = (None, None, None),
    **options: bool,
) -> None:
    base = Model()
    x = torch.randn(5, 8)
    expected = [torch.zeros(5, 12) for _ in base.blocks()]
    weights = [1.0, -0.5, 2.0]
    with TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("one", "two", "three")]
        for path, weight, r, alpha, own in zip(
            paths, weights, ranks, (12, 10, 4), layers, strict=True
        ):
            given = options | ({"layers": own} if own else {})
            model, handle = trained_adapter(lora, base, r, alpha, **given)
            lora.save(handle, path)
            for total, update in zip(expected, updates(model, base, x), strict=True):
                total += weight * update
        with may_refuse() if options or layers[0] else nullcontext():
            lora.combine(paths, weights, Path(directory) / "sum")
        whole = deepcopy(base)
        lora.load(whole, Path(directory) / "sum", **SETTINGS)
    for i, (found, wanted) in enumerate(zip(updates(whole, base, x), expected, strict=True)):
        expect_same(found, wanted, f"the sum of the updates of h.{i}", 1e-4)


def updates(model: Model, base: Model, x: Tensor) -> list[Tensor]:
    pairs = zip(model.blocks(), base.blocks(), strict=True)
    return [(one.proj(x) - other.proj(x)).detach() for one, other in pairs]
