"""Checks of saved adapters."""

import warnings
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from conformance.bench import Implementation, Missing, check, expect
from conformance.models import Model, draw, expect_same, off_by, trained

IDS = torch.arange(17)[None]
SETTINGS = {"targets": ["proj"], "r": 4, "alpha": 12}


def trained_adapter(lora: Implementation, base: Model, **options: Any) -> tuple[Model, Any]:
    """Return a copy of the base with a random adapter, and the handle."""
    model = deepcopy(base)
    handle = lora.inject(model, ["proj"], 4, 12, **options)
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


@check("A negative weight loses the sign, or A and B are summed apart.", "peft #1907", "peft #3004")
def weighted_sum_with_a_negative_weight(lora: Implementation) -> None:
    """Two adapters with the weights 1 and -0.5 add B1 A1 - 0.5 B2 A2."""
    base = Model()
    total = deepcopy(base)
    x = torch.randn(5, 8)
    linear = base.blocks()[0].proj
    with TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("one", "two", "sum")]
        updates = []
        for path in paths[:2]:
            model, handle = trained_adapter(lora, base)
            lora.save(handle, path)
            updates.append(model.blocks()[0].proj(x) - linear(x))
        lora.combine(paths[:2], [1.0, -0.5], paths[2])
        lora.load(total, paths[2], **SETTINGS)
    update = total.blocks()[0].proj(x) - linear(x)
    expect_same(update, updates[0] - 0.5 * updates[1], "the sum of the updates", 1e-4)
