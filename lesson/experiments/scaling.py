"""Which rate, by rank and by scaling rule? `python -m lesson.experiments.scaling`

Varied: the peak learning rate, the rank r of LoRA on all four layers, and the rule that gives the
scaling s of B A for a rank.
Fixed: mini, the default book, 60 steps of 4 windows of 128 tokens.
Measured: the validation perplexity, with three seeds at the best rate and the two rates beside it.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from common.figures import FULL, LORA
from lesson.experiments.common import SEEDS, as_command, describe_seeds, experiment, panels
from lesson.experiments.sweep import ALL, Runs, best_rate, finetune, scored, tune
from lesson.figures import draw_at, shades

FIXED: dict[str, Any] = {"lora_alpha": 16}
# At rank 8 every rule gives s = 2. s is alpha / r, or alpha / sqrt(r) for rsLoRA.
RULES: dict[str, Callable[[int], dict[str, Any]]] = {
    "alpha = 16: s = 16 / r": lambda r: FIXED,
    "alpha = 2 r: s = 2": lambda r: {"lora_alpha": 2 * r},
    "rsLoRA: s = 5.66 / sqrt(r)": lambda r: {"lora_alpha": 2 * 8**0.5, "use_rslora": True},
}
RANKS = (1, 8, 64)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
FULL_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)

# The search begins at the best rates found, by rule, at each of RANKS.
GUESSES = {
    "alpha = 16: s = 16 / r": (4e-3, 8e-3, 8e-3),
    "alpha = 2 r: s = 2": (1.6e-2, 8e-3, 2e-3),
    "rsLoRA: s = 5.66 / sqrt(r)": (8e-3, 8e-3, 4e-3),
}
FULL_GUESS = 1e-3


def curve(
    method: str,
    rates: Sequence[float],
    guess: float,
    **options: Any,
) -> Runs:
    """Return the perplexities by rate: one seed at all `rates`, and every seed at the best rate and
    the two rates beside it.
    """
    runs = {lr: finetune(method, SEEDS[:1], lr=lr, **options) for lr in rates}
    runs |= tune(method, guess, **options)
    return scored(dict(sorted(runs.items())))


def measure() -> dict[str, Any]:
    """Return perplexities by rule, rank and rate, and by rate for full fine-tuning."""
    data: dict[str, Any] = {rule: {} for rule in RULES}
    for rule, options in RULES.items():
        for r, guess in zip(RANKS, GUESSES[rule], strict=True):
            chosen = FIXED if r == 8 else options(r)
            data[rule][r] = curve("lora", RATES, guess, r=r, target_modules=ALL, **chosen)
    data["full"] = curve("full", FULL_RATES, FULL_GUESS)
    return data


def draw(data: dict[str, Any]) -> Any:
    """Draw the perplexity by rate: a panel per rule, a shade per rank, and full fine-tuning."""
    best = data["full"][best_rate(data["full"])]
    lowest = mean(best)
    caption = (
        "LoRA of rank r is on all four layers of a block, and B A is multiplied by s. 60 steps of "
        "4 windows of 128 tokens. Circle: the best rate. There and beside it: means of "
        f"{describe_seeds(len(best))}. Elsewhere: one seed. Lines that leave a panel go to a "
        "higher perplexity."
    )
    title = "The perplexity by learning rate, for three ranks and three rules for alpha (mini)"
    figure, axes = panels(title, caption, *RULES, height=4.7)
    for axis, rule in zip(axes, RULES, strict=True):
        draw_curve(axis, data["full"], FULL, "full")
        for (r, runs), colour in zip(
            data[rule].items(), shades(LORA, len(data[rule])), strict=True
        ):
            draw_curve(axis, runs, colour, f"LoRA, r = {r}")
        axis.set(xscale="log", xlabel="peak learning rate (log)")
        axis.set_ylim(0.95 * lowest, 1.85 * lowest)
        draw_at(axis.xaxis, (1e-3, 1e-2), ("1e-3", "1e-2"))
    axes[0].set(ylabel="validation perplexity")
    axes[0].legend()
    return figure


def draw_curve(axis: Any, runs: dict[str, list[float]], colour: str, label: str) -> None:
    """Draw the mean over the seeds by rate, with a ring around the best."""
    rates = [float(lr) for lr in runs]
    means = [mean(found) for found in runs.values()]
    axis.plot(rates, means, ".-", color=colour, label=label)
    best = best_rate(runs)
    axis.plot(float(best), mean(runs[best]), "o", color=colour, markersize=9, fillstyle="none")


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("scaling", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
