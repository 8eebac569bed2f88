"""The repeated reference run: its protocol and measure against the reference's training loop."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import ours, reference
from benchmarks.reference import METHODS, TEXT
from tests.helpers import TINY, tiny_gpt2_directory
from tests.runs import one_line, run, stdout_of, stock_model, token_parts, validation_loss
from training.options import BOOK

STEPS = 3


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A tiny base with the protocol's context of 128 tokens."""
    return tiny_gpt2_directory(
        tmp_path_factory.mktemp("wide"), n_positions=128, n_embd=16, n_head=2, n_layer=1
    )[0]


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / TEXT.name
    path.write_text(TEXT.read_text()[:2600])
    return path


def arguments(base: Path, book: Path, out: Path, *options: object) -> list[object]:
    standard = ["--base", base, "--book", book, "--out", out, "--device", "cpu"]
    return [*standard, "--max-steps", STEPS, *options]


def repeat(base: Path, book: Path, out: Path, *options: object) -> tuple[str, dict]:
    """Return the command's output and its figures."""
    said = stdout_of(reference.main, *arguments(base, book, out, *options))
    return said, json.loads((out / "reference.json").read_text())


@pytest.fixture(scope="module")
def repeated(wide_base, short_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "runs"
    said, figures = repeat(wide_base, short_text, out)
    return SimpleNamespace(base=wide_base, book=short_text, out=out, stdout=said, figures=figures)


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


def test_the_reference_s_loop_on_its_own_library_measures_the_same(repeated):
    _, ids = token_parts(repeated.book)
    base = repeated.base
    out = repeated.out
    for method, batch_size, model in (
        ("base", 16, stock_model(base)),
        ("lora", 16, stock_model(base, out / "lora")),
        ("full", 64, stock_model(out / "full")),
    ):
        assert (len(ids) - 128) % batch_size  # so means over batches and over windows differ
        here = repeated.figures["here"][method]
        expected = reference_validation(model, ids, batch_size)
        assert here["reference"]["loss"] == pytest.approx(expected, rel=1e-5)
        assert here["reference"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert f"{here['reference']['perplexity']:.4f}" in repeated.stdout
        next_token = validation_loss(model, ids, block=128)
        assert here["next_token"]["loss"] == pytest.approx(next_token, rel=1e-5)
        assert here["next_token"]["loss"] != pytest.approx(expected, rel=1e-3)


def test_training_minimises_the_reference_s_loss_on_the_reference_s_windows(repeated):
    protocol = METHODS["lora"].split()
    device = ("--device", "cpu")
    options = ours.options("lora", *protocol, *device, base=repeated.base, book=repeated.book)
    made = ours.Steps(options)
    made.model.eval()
    train_ids, _ = token_parts(repeated.book)
    x, y = reference_windows(train_ids)
    assert len(made.data.training) == len(x)
    x, y = x[:64], y[:64]
    inputs, targets = made.data.training.batch(np.arange(64))
    here = made.model.loss(inputs, targets) / targets.numel()
    theirs = stock_model(repeated.base)(input_ids=x, labels=y).loss
    assert here.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_it_says_which_options_left_the_protocol_and_names_no_directory(repeated):
    assert f"--max-steps {STEPS}: not the whole protocol" in repeated.stdout
    assert f"BASE={repeated.base.name} BOOK={TEXT.name} ARGS=" in repeated.figures["command"]
    assert repeated.figures["date"] > "2026"
    text = json.dumps(repeated.figures)
    assert str(repeated.base.parent) not in text
    assert str(repeated.book.parent) not in text


def test_finished_runs_are_scored_again_on_fewer_windows_and_it_says_so(repeated):
    weights = repeated.out / "lora" / "adapter_model.safetensors"
    kept = weights.stat().st_mtime_ns
    _, ids = token_parts(repeated.book)
    total = len(ids) - 128
    shutil.rmtree(repeated.out / "full")  # a run that has not begun is not resumed

    said, found = repeat(
        repeated.base, repeated.book, repeated.out, "--resume", "--val-windows", 20
    )
    assert found["here"]["full"]["steps"] == STEPS
    assert found["val_windows"] == {"scored": 20, "all": total}
    assert f"on only 20 of the {total} validation windows" in said
    assert "on all" in repeated.stdout
    assert weights.stat().st_mtime_ns == kept

    before = repeated.figures["here"]["lora"]
    again = found["here"]["lora"]
    assert again["next_token"] == before["next_token"]
    assert again["reference"]["loss"] == pytest.approx(before["reference"]["loss"], rel=0.02)
    assert again["reference"]["loss"] != before["reference"]["loss"]


def test_the_share_seen_before_is_counted_right(repeated):
    train_ids, val_ids = token_parts(repeated.book)
    known = {tuple(run) for run in train_ids.unfold(0, 16, 1).tolist()}
    seen = [tuple(run) in known for run in val_ids.unfold(0, 16, 1).tolist()]
    assert repeated.figures["seen_before"] == pytest.approx(np.mean(seen))

    train_ids, val_ids = token_parts(BOOK)
    assert reference.share_seen(train_ids.numpy(), val_ids.numpy()) < 0.1 < np.mean(seen)


def test_a_base_or_a_book_too_short_for_a_window_is_refused(base, wide_base, short_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Three words only.")
    out = tmp_path / "out"
    for directory, book, words in (
        (base, short_text, ("--block-size 128", str(TINY["n_positions"]))),
        (wide_base, short, (str(short),)),
    ):
        line = one_line(run(reference.main, *arguments(directory, book, out)), 2)
        assert all(word in line for word in words)
        assert list(tmp_path.iterdir()) == [short]
