"""Fine-tune mini over and over with other options; compare choices, each at its best rate."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

from torch import Tensor

from common.figures import BASE, LORA
from lesson.experiments.common import Trainer, panels, save, spread, trainer
from lora.inject import lora_layers

# A choice to compare: the learning rates to try, and the options that set it apart.
Choice = tuple[Sequence[float], dict[str, Any]]


def perplexity(made: Trainer) -> float:
    """Return the perplexity on the validation part."""
    return made.evaluate().perplexity


def train(made: Trainer) -> None:
    """Take every step."""
    for batch in made.batches():
        made.step(batch)


def finetune(
    method: str,
    seeds: Iterable[int] = (0,),
    short: bool = False,
    measure: Callable[[Trainer], Any] = perplexity,
    **options: Any,
) -> list[Any]:
    """Train 60 steps of 8 windows of 64 tokens with each seed; measure each result."""
    size = {"batch_size": 8, "block_size": 64, "stride": 64, "max_steps": 60}
    measured = []
    for seed in seeds:
        made = trainer(method, seed, "auto", short, **(size | options))
        train(made)
        result = measure(made)
        print(method, options, f"seed {seed}:", result, flush=True)
        measured.append(result)
    return measured


def tuned(method: str, seed: int, short: bool) -> tuple[Trainer, dict[str, Tensor]]:
    """Train 60 steps of 16 windows of 128 tokens, by "LoRA" at lr 1e-3 or by "full" at 1e-4.

    Returns the trainer, and by name the change of each matrix of the blocks that changed.
    """
    lr = 1e-4
    if method == "LoRA" or short:  # in a few steps at 1e-4 little would change
        lr = 1e-3
    made = trainer(method.lower(), seed, short=short, batch_size=16, max_steps=60, lr=lr)
    if method == "LoRA":
        train(made)
        layers = lora_layers(made.model)
        return made, {f"{name}.weight": layer.delta_weight() for name, layer in layers.items()}

    matrices = {}
    before = {}
    for name, parameter in made.model.named_parameters():
        if name.startswith("h.") and parameter.ndim == 2:
            matrices[name] = parameter
            before[name] = parameter.detach().clone()
    train(made)
    return made, {name: p.detach() - before[name] for name, p in matrices.items()}


def best_rate(runs: dict[float, list[float]]) -> float:
    """Return the rate whose run has the least perplexity."""
    return min(runs, key=lambda lr: runs[lr])


def compare(args: argparse.Namespace, name: str, title: str, choices: dict[str, Choice]) -> dict:
    """Train LoRA by each choice: at each of its rates with the first seed, at the best with all.

    Returns, and saves with a picture, the perplexities by choice and rate.
    """
    data: dict[str, dict[float, list[float]]] = {}
    best_rates = {}
    for label, (rates, options) in choices.items():
        if args.short:
            rates = rates[1:2]
        runs = {lr: finetune("lora", args.seeds[:1], args.short, lr=lr, **options) for lr in rates}
        best = best_rate(runs)
        runs[best] += finetune("lora", args.seeds[1:], args.short, lr=best, **options)
        print(f"{label}: {spread(runs[best])} at {best:g}")
        data[label] = runs
        best_rates[label] = best
    return save(args, name, data, draw(title, data, best_rates))


def draw(title: str, data: dict[str, dict[float, list[float]]], rates: dict[str, float]) -> Any:
    """Draw a bar for each choice at its rate, from the least perplexity to the greatest."""
    figure, (axis,) = panels(title)
    for row, (label, runs) in enumerate(data.items()):
        found = runs[rates[label]]
        ends = (min(found), max(found))
        middle = mean(found)
        if row == 0:
            axis.axvspan(*ends, color=BASE, alpha=0.2)
        axis.plot(ends, (label, label), color=LORA, linewidth=5, solid_capstyle="butt")
        axis.plot(middle, label, "ko", markersize=4)
        axis.annotate(
            f"{middle:.1f} (lr {rates[label]:g})",
            (middle, label),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axis.set(
        xlabel="perplexity at the best lr: mean, min and max of seeds (grey: first row's)",
        ylim=(len(data) - 0.5, -0.7),
        xmargin=0.12,
    )
    return figure
