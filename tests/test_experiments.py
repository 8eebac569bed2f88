"""The lesson's formulas against autograd or counts by hand, and their pictures."""

import shutil
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

from lesson.experiments import memory, scaling
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


def test_memory_is_counted_exactly_by_hand(monkeypatch):
    """For activations, terms below one part in a hundred are left out."""
    small = replace(memory.CONFIG, vocab_size=8192, n_embd=256, n_layer=2, n_head=4)
    monkeypatch.setattr(memory, "BATCH", 4)
    monkeypatch.setattr(memory, "CONFIG", small)
    for sides in memory.measure().values():
        for part, counted in sides["predicted"].items():
            tolerance = 0.04 if part == "activations" else 2e-4  # AdamW also stores its steps
            assert counted == pytest.approx(sides["measured"][part], rel=tolerance), part
    assert memory.predicted("lora", memory.GPT2Config(), 1)["gradients"] == 4 * 294_912
