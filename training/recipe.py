"""Recipes: the reference run's settings of LoRA, or those that do best for their price."""

from typing import Any

from data.instructions import Instructions
from data.windows import Windows

REFERENCE = "reference"
BEST = "best"
# What a recipe sets of the adapter, unless the option is given.
ADAPTERS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    BEST: {"target_modules": ("c_attn", "c_proj", "c_fc"), "lora_alpha": 16},
}
HIGHEST = 8e-3
LOWEST = 1e-3
FEW_PASSES = 1.5  # up to so many, the highest rate


def count_passes(
    training: Windows | Instructions, epochs: int, max_steps: int | None, batch: int
) -> float:
    """Return how often a run reads each token of its training part, on average.

    Windows that overlap read a token more than once an epoch.
    """
    windows = epochs * len(training)
    if max_steps:
        windows = min(windows, max_steps * batch)
    return training.passes_per_epoch * windows / len(training)


def best_rate(passes: float) -> float:
    """Return the peak learning rate of LoRA on all layers with alpha 16, whatever its rank.

    It falls as 1 / passes, between `HIGHEST` and `LOWEST`; two digits of it count.
    """
    rate = HIGHEST * FEW_PASSES / passes
    return float(f"{min(HIGHEST, max(LOWEST, rate)):.1e}")
