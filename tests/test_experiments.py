"""The lesson's formulas against autograd or counts by hand, and their pictures."""

import shutil
from argparse import Namespace
from importlib import import_module

import pytest
import torch
from torch import nn

from lesson.experiments import (
    amplification,
    changes,
    memory,
    scaling,
    spectrum,
)
from lora.config import LoRAConfig
from lora.layer import LoRALinear
from training.options import ROOT

FIGURES = ROOT / "docs" / "figures"


def drawn_experiments():
    """Return the experiments that can draw again, by the names of their published data."""
    names = [path.stem for path in sorted(FIGURES.glob("*.json"))]
    modules = [import_module(f"lesson.experiments.{name}") for name in names]
    return [module for module in modules if hasattr(module, "draw")]


@pytest.mark.parametrize("experiment", drawn_experiments(), ids=lambda module: module.__name__)
def test_the_published_data_is_drawn(experiment, tmp_path):
    name = experiment.__name__.rpartition(".")[2]
    shutil.copy(FIGURES / f"{name}.json", tmp_path)
    experiment.main(["--draw", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_alpha_is_the_learning_rate_of_b():
    """AdamW on s B A at one rate equals AdamW on B' A with B' = s B, at s times the rate for B'."""
    torch.manual_seed(0)
    batches = torch.randn(5, 7, 12).double()
    target = torch.randn(7, 20).double()
    results = []
    for alpha, rate_of_b in ((12, 0.01), (3, 0.04)):  # s is 4 and 1
        torch.manual_seed(1)
        layer = LoRALinear(nn.Linear(12, 20), LoRAConfig(r=3, lora_alpha=alpha, lora_dropout=0))
        layer.double()
        groups = [
            {"params": layer.lora_A.parameters(), "lr": 0.01},
            {"params": layer.lora_B.parameters(), "lr": rate_of_b},
        ]
        optimizer = torch.optim.AdamW(groups, eps=1e-30, weight_decay=0)
        for x in batches:
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
        results.append((layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).detach())
    torch.testing.assert_close(*results)
    assert results[0].abs().max() > 0.01


def test_the_rules_for_the_scaling_agree_at_rank_8_alone():
    for rule, r8, r64 in zip(scaling.RULES.values(), (2, 2, 2), (0.25, 2, 2 / 8**0.5), strict=True):
        assert LoRAConfig(r=8, **rule(8)).scaling == pytest.approx(r8)
        assert LoRAConfig(r=64, **rule(64)).scaling == pytest.approx(r64)


def test_a_change_is_compared_with_w_in_the_changes_directions():
    """Two random directions match the expectation, and W's largest directions contain all."""
    torch.manual_seed(0)
    weight = torch.randn(30, 20)
    u, s, vh = torch.linalg.svd(weight)

    def ratios(b, a):
        layer = changes.described("h.0.mlp.c_fc.weight", weight, b @ a)
        return amplification.ratios([layer], "mlp.c_fc", rank=2, size=600) | layer

    largest = ratios(u[:, :2] * s[:2] / 4, vh[:2])
    assert largest["to its own"] == pytest.approx(1, rel=1e-5)
    assert largest["amplification"] == pytest.approx(1 / 4, rel=1e-5)
    assert largest["intruders"] == 0

    random = [ratios(torch.randn(30, 2), torch.randn(2, 20)) for _ in range(400)]
    squares = [found["to random"] ** 2 for found in random]
    assert sum(squares) / len(squares) == pytest.approx(1, rel=0.1)


def test_similarity_is_that_of_hu_et_al():
    """phi is 1 for equal subspaces, 0 for orthogonal ones, and independent of the basis."""
    torch.manual_seed(0)
    some, others = torch.randn(2, 3, 20, 12)  # three blocks each
    v = torch.linalg.svd(some).Vh
    w = torch.linalg.svd(others).Vh
    found = spectrum.similarity(v, w)
    for k in (1, 5, 12):
        norms = [torch.linalg.matrix_norm(v[block, :k] @ w[block, :k].T) for block in range(3)]
        by_hand = torch.stack(norms).square().mean() / k
        torch.testing.assert_close(found[k - 1], by_hand)
    torch.testing.assert_close(spectrum.similarity(v, -v), torch.ones(12))
    assert spectrum.similarity(v[:, :6], v[:, 6:]).max() < 1e-6


def test_memory_is_counted_exactly_by_hand(monkeypatch):
    """For activations, terms below one part in a hundred are left out."""
    monkeypatch.setattr(memory, "BATCH", 4)
    for sides in memory.measure(Namespace(short=True)).values():
        for part, counted in sides["predicted"].items():
            tolerance = 0.04 if part == "activations" else 2e-4  # AdamW also stores its steps
            assert counted == pytest.approx(sides["measured"][part], rel=tolerance), part
    assert memory.predicted("lora", memory.GPT2Config(), 1)["gradients"] == 4 * 294_912
