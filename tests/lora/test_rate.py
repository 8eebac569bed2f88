"""The search for a learning rate: the walk, the parabola, and a model that is left as it was."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRAConfig, adamw_run, find_rate, inject

IN, OUT, ROWS = 16, 8, 64


def task():
    """Return a model with an adapter, and batches of a linear task that the adapter can learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, OUT))
    teacher = deepcopy(model)
    teacher[2].weight.data += 0.3 * torch.randn(OUT, 2) @ torch.randn(2, IN)
    inject(model, LoRAConfig(r=4, lora_dropout=0.1, target_modules=["2"]))
    inputs = torch.randn(16, ROWS, IN)
    batches = [(x, teacher(x).detach()) for x in inputs]
    return model, batches[:12], batches[12:]


def loss_of(model):
    return lambda batch: F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("first", [4e-3, 5e-4, 0.3])
def test_the_rate_is_within_a_factor_of_two_of_the_best_of_a_fine_grid(first):
    model, batches, held_out = task()
    run = adamw_run(model, loss_of(model), batches, held_out)
    found = find_rate(model, run, first=first)
    grid = [4e-3 * 2 ** (i / 2) for i in range(16)]

    def fresh(rate):
        other, *_ = task()
        torch.manual_seed(1)
        return adamw_run(other, loss_of(other), batches, held_out)(rate)

    best = min(grid, key=fresh)
    assert best / 2 < found.rate < best * 2
    assert list(found.tried) == sorted(found.tried) and first in found.tried


def test_the_model_and_the_random_state_are_as_before():
    model, batches, held_out = task()
    before = deepcopy(model.state_dict())
    random = torch.get_rng_state()
    run = adamw_run(model, loss_of(model), batches, held_out)
    losses = []

    def watched(rate):
        losses.append(run(rate))
        changed = model.state_dict()["2.lora_B.weight"]
        assert not torch.equal(changed, before["2.lora_B.weight"])
        return losses[-1]

    found = find_rate(model, watched)
    assert sorted(found.tried.values()) == sorted(losses)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())  # a first `backward` would add to it


def test_an_interrupted_search_leaves_the_model_as_it_was():
    model = nn.Linear(1, 1)
    before = deepcopy(model.state_dict())

    def interrupted(rate):
        nn.init.zeros_(model.weight)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_rate(model, interrupted)
    assert torch.equal(model.weight, before["weight"])


def test_a_parabola_through_three_losses_gives_the_minimum():
    def loss(rate):
        return 0.01 * (math.log2(rate / 3e-3)) ** 2

    def loss_with_a_cliff(rate):
        return loss(rate) + (rate > 5e-3) * 9

    assert find_rate(nn.Linear(1, 1), loss).rate == 3e-3
    assert 2.7e-3 < find_rate(nn.Linear(1, 1), loss_with_a_cliff).rate < 3e-3


def test_rates_that_diverge_are_walked_away_from_and_all_of_them_refused():
    def loss(rate):
        return math.nan if rate > 1e-3 else abs(math.log2(rate / 5e-4))

    assert find_rate(nn.Linear(1, 1), loss, first=1.6e-2).rate == 5e-4
    with pytest.raises(ValueError, match="not a finite number at any"):
        find_rate(nn.Linear(1, 1), lambda rate: math.inf)
