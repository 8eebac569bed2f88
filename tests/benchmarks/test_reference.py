"""The repeated reference run: its protocol and measure against the reference's training loop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.reference import TEXT
from tests.helpers import tiny_gpt2_directory
from tests.runs import stdout_of, stock_model, token_parts, validation_loss


@pytest.fixture
def wide_base(tmp_path):
    """A tiny base with the protocol's context of 128 tokens."""
    small = {"n_embd": 16, "n_head": 2, "n_layer": 1}
    return tiny_gpt2_directory(tmp_path / "wide", n_positions=128, **small)[0]


@pytest.fixture
def short_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / TEXT.name
    path.write_text(TEXT.read_text()[:2600])
    return path


def arguments(base: Path, book: Path, out: Path) -> list[object]:
    standard = ["--base", base, "--book", book, "--out", out, "--device", "cpu"]
    return [*standard, "--max-steps", 3]


def reference_windows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows of the reference's dataset, x and y (N, 128)."""
    return ids[:-1].unfold(0, 128, 1), ids[1:].unfold(0, 128, 1)


@torch.no_grad()
def reference_validation(model: nn.Module, ids: Tensor, batch_size: int) -> float:
    """Run the reference's validation loop, with the reference's library."""
    x, y = reference_windows(ids)
    losses = []
    for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        losses.append(model(input_ids=inputs, labels=labels).loss.item())
    return float(np.mean(losses))


def test_the_reference_s_loop_on_its_own_library_measures_the_same(wide_base, short_text, tmp_path):
    out = tmp_path / "runs"
    said = stdout_of(reference.main, *arguments(wide_base, short_text, out))
    stored = (out / "reference.json").read_text()
    assert "--max-steps 3: not the whole protocol" in said and str(tmp_path) not in stored
    _, ids = token_parts(short_text)
    for method, batch_size, model in (
        ("base", 16, stock_model(wide_base)),
        ("lora", 16, stock_model(wide_base, out / "lora")),
        ("full", 64, stock_model(out / "full")),
    ):
        assert (len(ids) - 128) % batch_size  # so means over batches and over windows differ
        here = json.loads(stored)["here"][method]
        expected = reference_validation(model, ids, batch_size)
        assert here["reference"]["loss"] == pytest.approx(expected, rel=1e-5)
        assert here["reference"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert f"{here['reference']['perplexity']:.4f}" in said
        next_token = validation_loss(model, ids, block=128)
        assert here["next_token"]["loss"] == pytest.approx(next_token, rel=1e-5)
        assert here["next_token"]["loss"] != pytest.approx(expected, rel=1e-3)
