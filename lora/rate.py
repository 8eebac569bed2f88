"""Find the peak learning rate of a run by short runs."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora.parameters import trained_parameters

BatchType = TypeVar("BatchType")

FIRST = 4e-3  # near the best rate of LoRA on all layers with alpha 16, in 24 steps
MOST_RUNS = 12
MOST_RISE = 0.2  # nats


@dataclass(frozen=True)
class RateSearch:
    """The result of `find_rate`: the rate for the run, and what the search tried."""

    rate: float
    tried: dict[float, float]  # the loss on the held-out text after a short run, by peak rate
    seconds: float


def find_rate(
    model: nn.Module, short_run: Callable[[float], float], first: float = FIRST
) -> RateSearch:
    """Find a peak learning rate by short runs.

    `short_run(rate)` trains `model` for a few steps with this peak rate, and returns the loss on a
    text that it does not train on. `adamw_run` returns such a function. Every short run starts from
    the present parameters and random state, and both are restored at the end.

    A model that reads a text several times learns it by heart, unless the rate is low. So if the
    whole run reads its text p times, let a short run read a few batches p times (at most about 6).

    The search tries `first` and twice `first`, and then walks by factors of 2 until a rate is
    better than both its neighbours. The result is the minimum of a parabola through the three
    losses over log rate.

    Raises ValueError if the loss is not a finite number at any rate tried.
    """
    began = time.perf_counter()
    trained = trained_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    devices = list({parameter.device for parameter in trained.values() if parameter.is_cuda})
    mps_state = None  # `fork_rng` cannot restore the random state of Apple's GPU
    if any(parameter.is_mps for parameter in trained.values()):
        mps_state = torch.mps.get_rng_state()

    def loss_at(rate: float) -> float:
        try:
            with torch.random.fork_rng(devices):
                loss = short_run(rate)
        finally:  # also after Ctrl-C in a notebook, where the cell is run again
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(start[name])
                    parameter.grad = None  # the first step after the search would add to it
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
        return loss if math.isfinite(loss) else math.inf

    tried = walk(loss_at, first)
    return RateSearch(float(f"{lowest_point(tried):.1e}"), tried, time.perf_counter() - began)


def walk(loss_at: Callable[[float], float], first: float) -> dict[float, float]:
    """Return the losses by rate, in order of the rate. The best rate has a neighbour on each side,
    unless it is one of the outermost of `MOST_RUNS` rates."""
    tried = {first: loss_at(first), 2 * first: loss_at(2 * first)}
    while len(tried) < MOST_RUNS:
        best = min(tried, key=lambda rate: (tried[rate], rate))  # the lowest, if all diverge
        missing = [rate for rate in (best / 2, best * 2) if rate not in tried]
        if not missing:
            break
        tried[missing[0]] = loss_at(missing[0])
    if not math.isfinite(min(tried.values())):
        raise ValueError("the loss is not a finite number at any learning rate tried")
    return dict(sorted(tried.items()))


def lowest_point(tried: dict[float, float]) -> float:
    """Return the rate at the minimum of a parabola through the best rate and its two neighbours.

    With losses l, m and r at log2 rates -1, 0 and 1 from the best rate, the minimum is at
    (l - r) / (2 (l - 2 m + r)). It is between -1/2 and 1/2, because m is the least of the three.
    Above the best rate, the loss can rise steeply, which would draw the minimum to the left. So a
    neighbour counts as at most `MOST_RISE` above m.
    """
    best = min(tried, key=tried.__getitem__)
    middle = tried[best]
    limit = middle + MOST_RISE
    left, right = (min(tried.get(rate, limit), limit) for rate in (best / 2, best * 2))
    bend = left - 2 * middle + right
    return best * 2 ** ((left - right) / (2 * bend)) if bend else best


def adamw_run(
    model: nn.Module,
    loss: Callable[[BatchType], Tensor],
    batches: Sequence[BatchType],
    held_out: Iterable[BatchType],
) -> Callable[[float], float]:
    """Return a `short_run` for `find_rate`: AdamW on the trained parameters, with a short warm-up
    and half a cosine, gradients clipped to norm 1, and a step for each batch.

    `loss(batch)` returns the mean loss of a batch. The run returns its mean over `held_out`.
    """

    def run(rate: float) -> float:
        parameters = list(trained_parameters(model).values())
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        was_training = model.training
        model.train()
        for step, batch in enumerate(batches):
            rise = min(1.0, (step + 1) / 2)
            fall = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            optimizer.param_groups[0]["lr"] = rate * rise * fall
            optimizer.zero_grad()
            loss(batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            losses = [loss(batch).item() for batch in held_out]
        model.train(was_training)
        return sum(losses) / len(losses)

    return run
