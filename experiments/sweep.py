"""Fine-tune mini over and over with other options, and draw what comes out."""

from collections.abc import Callable

import torch

from experiments.common import trainer
from train import Trainer


def finetune(method: str, seeds: int = 1, short: bool = False,
             measure: Callable[[Trainer], object] = lambda made: made.evaluate().perplexity,
             **options: object) -> list:
    """Train 60 steps of 8 windows of 64 tokens with each seed, and measure each result."""
    result = []
    for seed in range(1 if short else seeds):
        made = trainer(method, seed, "auto", batch_size=8, block_size=64, stride=64,
                       max_steps=12 if short else 60, **options)
        for batch in made.batches():
            made.step(batch)
        result.append(measure(made))
    print(method, options, result, flush=True)
    return result


def curve(axis, results: dict[float, list[float]], colour: str, label: str) -> None:
    """Plot the mean over seeds at each x, and a band from the least to the most."""
    x, y = list(results), torch.tensor(list(results.values()))  # y: (points, seeds)
    axis.plot(x, y.mean(1), ".-", color=colour, label=label)
    axis.fill_between(x, y.amin(1), y.amax(1), color=colour, alpha=0.2)
