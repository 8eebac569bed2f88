"""Checks of saved adapters."""

import warnings
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lora_conformance.bench import Implementation, Missing, check, expect
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


@check(
    "The keys of a compiled model match nothing, and loading ignores that.",
    "nanoGPT #325",
    "ACE-Step #615",
    "vLLM #34186",
)
def saved_adapter_loads(lora: Implementation) -> None:
    """A saved adapter, also of a compiled model, loads to the same outputs or raises an error."""
    base = Model()
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
        unchanged = off_by(fresh(IDS), base(IDS)) < 1e-6
        expect(not unchanged, f"the file of {kind} loads without an effect")
        expect_same(fresh(IDS), expected, f"the output with the file of {kind}", 1e-6)


@check("A loaded adapter is put on a base that was never frozen.", "mlx-vlm #2178")
def loading_freezes_the_base(lora: Implementation) -> None:
    """After injecting an adapter, or loading one, no weight of the base is trained."""
    model, fresh = Model(), Model()
    weights = {"injecting": list(model.parameters()), "loading": list(fresh.parameters())}
    handle = lora.inject(model, ["proj"], 4, 12)
    with TemporaryDirectory() as directory:
        lora.save(handle, Path(directory) / "adapter")
        lora.load(fresh, Path(directory) / "adapter", **SETTINGS)
    for how, tensors in weights.items():
        found = sum(tensor.requires_grad for tensor in tensors)
        expect(not found, f"after {how}, {found} of the base's {len(tensors)} tensors are trained")


@check("The file lacks use_rslora, so loading scales by alpha / r.")
def rslora_is_saved(lora: Implementation) -> None:
    """An rsLoRA adapter has the same output after saving and loading."""
    expect_saved(lora, use_rslora=True)


@check("The file lacks the magnitude, or the magnitude is computed again.", "espnet #6425")
def dora_is_saved(lora: Implementation) -> None:
    """A DoRA adapter has the same output after train(), eval(), saving and loading."""
    expect_saved(lora, use_dora=True)


def expect_saved(lora: Implementation, **options: bool) -> None:
    base = Model()
    fresh = deepcopy(base)
    model, handle = trained_adapter(lora, base, **options)
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


@check("A file whose names match nothing loads without a warning.", "nanoGPT #325", "vLLM #34186")
def file_of_another_model_is_noticed(lora: Implementation) -> None:
    """A file whose names match nothing in the model is refused, or a warning is given."""
    _, handle = trained_adapter(lora, Model())
    other = Model(name="layers")
    with TemporaryDirectory() as directory, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.save(handle, Path(directory) / "adapter")
        try:
            lora.load(other, Path(directory) / "adapter", **SETTINGS)
        except Missing:
            raise
        except Exception:
            return
    expect(caught, "a file that matches nothing loads without an error or a warning")


@check("Saving sorts the patterns, and the first match counts.", "peft 0.21.2")
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


@check(
    "A weight loses the sign, A and B are summed apart, or every adapter gets the first alpha.",
    "peft #1907",
    "peft #3004",
)
def weighted_sum_with_a_negative_weight(lora: Implementation) -> None:
    """Three adapters of different ranks and alphas add w1 D1 + w2 D2 + w3 D3, also if w2 < 0."""
    expect_sum(lora)


@check("The sum has the scaling of LoRA, alpha / r, or of another rank.", "peft #3449")
def weighted_sum_of_rslora(lora: Implementation) -> None:
    """A weighted sum of rsLoRA adapters is refused, or adds the updates."""
    expect_sum(lora, use_rslora=True)


@check("The sum has the factors, and not the magnitudes.", "peft #3608")
def weighted_sum_of_dora(lora: Implementation) -> None:
    """A weighted sum of DoRA adapters is refused, or adds the updates."""
    expect_sum(lora, use_dora=True)


def expect_sum(lora: Implementation, **options: bool) -> None:
    base = Model()
    total = deepcopy(base)
    x = torch.randn(5, 8)
    linear = base.blocks()[0].proj
    expected = torch.zeros(5, 12)
    weights = [1.0, -0.5, 2.0]
    with TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("one", "two", "three", "sum")]
        for path, weight, r, alpha in zip(paths, weights, (4, 2, 2), (12, 10, 4), strict=False):
            model, handle = trained_adapter(lora, base, r, alpha, **options)
            lora.save(handle, path)
            expected += weight * (model.blocks()[0].proj(x) - linear(x))
        try:
            lora.combine(paths[:3], weights, paths[3])
        except (ValueError, RuntimeError):
            if not options:  # only sums of variants may be refused
                raise
            return
        lora.load(total, paths[3], **SETTINGS)
    update = total.blocks()[0].proj(x) - linear(x)
    expect_same(update, expected, "the sum of the updates", 1e-4)
