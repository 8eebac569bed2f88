"""Recipes: the reference run's settings of LoRA, or those that did best for their price."""

from typing import Any

REFERENCE = "reference"
BEST = "best"
# What a recipe sets of the adapter, unless the option is given.
ADAPTERS: dict[str, dict[str, Any]] = {
    REFERENCE: {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ("c_attn",),
    },
    BEST: {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ("c_attn", "c_proj", "c_fc"),
    },
}
RATES = (5e-4, 8e-3)  # the least and the largest that were best somewhere


def best_rate(steps: int, passes: float) -> float:
    """Return the peak learning rate, to two digits, of LoRA on all layers with alpha 16:
    0.035 / (steps * passes^2)^(1/3), within `RATES`.

    `passes` is how often the run reads a token of its training part, on average. The rule was
    fitted to runs of 15 to 960 steps and 1.4 to 23 passes on `mini`; the rank hardly counts.
    """
    least, largest = RATES
    rate = 0.035 / (steps * passes**2) ** (1 / 3)
    return float(f"{min(max(rate, least), largest):.1e}")
