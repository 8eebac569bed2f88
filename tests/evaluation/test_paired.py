"""`evaluate.py --adapter A B`: the difference of two losses, and its standard error."""

import math

import numpy as np
import pytest
import torch

import evaluate
from common.errors import UserError
from evaluation.scores import RowLosses, paired_difference
from lora.save import save_adapter
from tests.helpers import TINY, small_tokenizer
from tests.pairs import adapted
from tests.runs import one_line, run, scores, stock_model, story

BLOCK = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(story(6))
    return path


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for target in ("c_attn", "c_fc"):
        save_adapter(adapted(base, (target,), r=2), folder / target, "gpt2")
    return sorted(folder.iterdir())


@torch.no_grad()
def stock_losses(base, adapter, ids: torch.Tensor) -> list[np.ndarray]:
    """Return the losses of the tokens of each window, by a stock model in fp64."""
    model = stock_model(base, adapter).double()
    rows = []
    for start in range(0, len(ids) - 1, BLOCK):
        inputs, targets = ids[start:-1][:BLOCK], ids[start + 1 :][:BLOCK]
        log_p = model(inputs[None]).logits[0].log_softmax(-1)
        rows.append(-log_p.gather(1, targets[:, None]).squeeze(1).numpy())
    return rows


def test_the_difference_is_that_of_two_stock_models(base, adapters, text, tmp_path):
    argv = ("--base", base, "--adapter", *adapters, "--text", text, "--block-size", BLOCK)
    found, said = scores(tmp_path / "scores.json", *argv)
    a, b = found["adapters"]

    ids = torch.from_numpy(small_tokenizer(TINY["vocab_size"]).encode(text.read_text()).astype(int))
    pairs = zip(*(stock_losses(base, adapter, ids) for adapter in adapters), strict=True)
    rows = [second - first for first, second in pairs]
    assert len(rows[-1]) < BLOCK == len(rows[0])
    mean = np.concatenate(rows).mean()
    of_rows = [(row - mean).sum() for row in rows]
    error = math.sqrt(len(rows)) * np.std(of_rows, ddof=1) / a["tokens"]

    assert b["difference"] == pytest.approx(mean, abs=1e-6) == pytest.approx(b["loss"] - a["loss"])
    assert b["standard_error"] == pytest.approx(error, rel=1e-4)
    assert error > 1e-3
    assert said.endswith(
        f"loss minus the loss of {adapters[0]}: {mean:+.4f} nats per token, "
        f"standard error {error:.4f}\n"
    )


def test_the_standard_error_is_the_spread_over_new_texts():
    """The tokens of a row share a part of their difference, and the rows have unequal lengths."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        tokens = rng.integers(5, 60, size=40)
        sums = tokens * (0.1 + rng.normal(size=40)) + np.sqrt(tokens) * rng.normal(size=40)
        zeros = RowLosses(torch.zeros(40, dtype=torch.float64), torch.from_numpy(tokens))
        found.append(paired_difference(zeros, zeros._replace(sums=torch.from_numpy(sums))))
    spread = np.std([one.difference for one in found])
    claimed = np.mean([one.standard_error for one in found])
    assert claimed == pytest.approx(spread, rel=0.05)
    assert np.mean([one.difference for one in found]) == pytest.approx(0.1, abs=0.02)


def test_what_cannot_be_compared_is_refused(base, adapters, text):
    argv = ("--base", base, "--adapter", *adapters, "--block-size", BLOCK, "--device", "cpu")
    line = one_line(run(evaluate.main, *argv, "--text", text, "--val-fraction", 0.1), 2)
    assert "more than one window" in line

    tokens = torch.tensor([3, 4])
    first = RowLosses(torch.ones(2, dtype=torch.float64), tokens)
    with pytest.raises(UserError, match="tokenizers"):
        paired_difference(first, first._replace(tokens=tokens + 1))
