"""How does the best rate fall with steps and passes? `python -m lesson.experiments.rates`

Varied: the steps, the windows per step, the share of the book that is read, and LoRA's rank.
Fixed: mini, windows of 128 tokens, LoRA on all four layers, alpha 16 at every rank.
Measured: the best learning rate, by the least of three validation perplexities, with three seeds at
the best rate and the two rates beside it.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.ours import Steps
from common.figures import BASE, INK, scientific
from lesson.experiments.common import as_command, experiment, panels
from lesson.experiments.sweep import ALL, Runs, at_best, best_rate, scored, tune
from lesson.figures import OTHER, name_line, shades
from training.options import Options

# Steps, windows per step, stride, rank, and the rate where the search begins. A stride of 128
# reads the whole training part. 512 reads every fourth window of 128 tokens, and 2048 every 16th.
RUNS = (
    (15, 16, 128, 8, 8e-3),
    (60, 1, 2048, 8, 2e-3),
    (60, 4, 128, 1, 4e-3),
    (60, 4, 128, 8, 8e-3),
    (60, 4, 128, 64, 8e-3),
    (60, 4, 512, 1, 2e-3),
    (60, 4, 512, 8, 2e-3),
    (60, 4, 512, 64, 4e-3),
    (60, 4, 2048, 8, 1e-3),
    (240, 1, 128, 1, 2e-3),
    (240, 1, 128, 8, 4e-3),
    (240, 1, 128, 64, 4e-3),
    (240, 1, 512, 8, 2e-3),
    (240, 1, 2048, 8, 5e-4),
    (240, 4, 128, 8, 2e-3),
    (960, 1, 128, 8, 1e-3),
)
LIMITS = (5e-4, 8e-3)  # about the least and the largest of the best rates
TOKENS = 21_230  # in the book's training part
MARKERS = {1: ("v", 0.85), 8: ("o", 1), 64: ("^", 1.18)}  # shape, and horizontal offset


def rule(steps: float, passes: float) -> float:
    """Return the rate that was fitted to these runs, for plain LoRA on all layers with alpha 16.

    `passes` is how often, on average, a run reads a token of the training part.
    """
    return 0.035 / (steps * passes**2) ** (1 / 3)


def rate_of_the_rule(options: Options) -> float:
    """Return the rule's rate for the run of `train.py` with these options, at most the limit."""
    plan = Steps(options).plan
    return float(f"{min(rule(plan.total_steps, plan.passes), LIMITS[1]):.1e}")


def vertex(runs: dict[Any, list[float]]) -> float:
    """Return the rate at the minimum of a parabola through the best rate and the two rates beside
    it. The parabola is log perplexity, averaged over seeds, by log rate.
    """
    best = float(best_rate(runs))
    means = {float(lr): math.log(mean(found)) for lr, found in runs.items()}
    low, middle, high = (means[best * factor] for factor in (0.5, 1, 2))
    return best * 2 ** ((low - high) / (2 * (low - 2 * middle + high)))


def fit(data: dict[str, dict[str, Any]]) -> tuple[float, float, float, float]:
    """Fit c * steps^a * passes^b to the best rates, by least squares of logarithms.

    Returns c, a, b, and the error as a factor, from the root mean square of the log errors.
    """
    y = np.log([vertex(run["runs"]) for run in data.values()])
    x = [[1, math.log(run["steps"]), math.log(run["passes"])] for run in data.values()]
    found, *_ = np.linalg.lstsq(np.array(x), y, rcond=None)
    off = np.sqrt(np.square(y - np.array(x) @ found).mean())
    return math.exp(found[0]), found[1], found[2], math.exp(off)


def measure() -> dict[str, Any]:
    """Return each run's steps, passes, and perplexities by rate."""
    data = {}
    for steps, batch, stride, r, guess in RUNS:
        size: dict[str, Any] = {"max_steps": steps, "batch_size": batch, "stride": stride}
        adapter: dict[str, Any] = {"r": r, "lora_alpha": 16, "target_modules": ALL}
        found = tune("lora", guess, score=at_best, **size, **adapter)
        runs: Runs = scored(found, at_best)
        passes = steps * batch * stride / TOKENS
        data[f"{steps} steps of {batch}, stride {stride}, r = {r}"] = {
            "steps": steps,
            "passes": passes,
            "r": r,
            "runs": runs,
        }
        best = vertex(runs)
        print(f"{passes:.1f} passes: {best:.1e}, {best / rule(steps, passes):.2f} of the rule")
    print("c, powers of steps and passes, off by:", *(f"{x:.3g}" for x in fit(data)))
    return data


def draw(data: dict[str, dict[str, Any]]) -> Any:
    """Draw the best rate by steps * passes^2, the only number in the rule, with the rule."""
    title = "LoRA's best rate in runs of 15 to 960 steps on one book, and a rule (mini)"
    caption = (
        "Point: the best rate of a run, at the minimum of a parabola through three rates, with "
        "three seeds each. A pass reads the text once. LoRA is on all four layers of a block, with "
        "alpha 16. The ranks of one run are side by side. Other points at one place differ in the "
        "windows per step."
    )
    figure, (axis,) = panels(title, caption, height=4.6)
    passes = sorted({run["passes"] for run in data.values()})
    colours = dict(zip(passes, shades(OTHER, len(passes)), strict=True))
    for run in data.values():
        marker, side = MARKERS[run["r"]]
        x = side * run["steps"] * run["passes"] ** 2
        colour = colours[run["passes"]]
        axis.plot(x, vertex(run["runs"]), marker, color=colour, markersize=7, alpha=0.8)

    x = np.geomspace(15, 3e5, 300)
    by_rule = np.array([rule(steps, 1) for steps in x])
    axis.plot(x, by_rule, ":", color=INK, linewidth=1)
    axis.plot(x, by_rule.clip(*LIMITS), color=INK)
    formula = "the rule: 0.035 / cube root of (steps * passes^2)"
    name_line(axis, formula, (700, rule(700, 1)), INK, (8, 10))
    name_line(axis, f"its limit: {scientific(LIMITS[1])}", (15, LIMITS[1]), INK, (0, -10))
    for count, colour in colours.items():
        axis.plot([], [], "s", color=colour, label=f"{count:.2g} passes")
    for r, (marker, _) in MARKERS.items():
        axis.plot([], [], marker, color=BASE, label=f"rank {r}")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="steps * passes^2 (log)",
        ylabel="best learning rate (log)",
    )
    axis.yaxis.set_major_formatter(scientific)
    axis.legend(loc="lower left", ncols=2)
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("rates", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
