"""Does LoRA have intruder dimensions, and do they hurt? `python -m lesson.experiments.intruders`

Varied: the method, LoRA's rank and rate, and the factor that scales down the intruders or the whole
change.
Fixed: mini, the default book, alpha 16, 60 steps of 4 windows of 128 tokens, three seeds.
Measured: the number of intruders among the ten largest singular vectors of each changed weight
(Shuttleworth et al. 2024), the validation perplexity, and the KL from the base (forgetting).
"""

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from adapters.inspect import INTRUDER, TOP
from common.figures import FULL, INK, LORA, OTHER, scientific
from lesson.experiments.changes import taken_apart
from lesson.experiments.common import as_command, describe_seeds, experiment, panels
from lesson.experiments.sweep import ALL, finetune
from lesson.figures import name_line

RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # the method and options of each run
    "c_attn, r = 8": ("lora", {"lr": 8e-3}),
    "r = 1": ("lora", {"r": 1, "lr": 8e-3, "target_modules": ALL}),
    "r = 1, half the rate": ("lora", {"r": 1, "lr": 4e-3, "target_modules": ALL}),
    "r = 8": ("lora", {"r": 8, "lr": 8e-3, "target_modules": ALL}),
    "r = 8, half the rate": ("lora", {"r": 8, "lr": 4e-3, "target_modules": ALL}),
    "r = 64": ("lora", {"r": 64, "lr": 8e-3, "target_modules": ALL}),
    "r = 64, half the rate": ("lora", {"r": 64, "lr": 4e-3, "target_modules": ALL}),
    "full": ("full", {"lr": 1e-3}),
    "full, half the rate": ("full", {"lr": 5e-4}),
    "full, an eighth of the rate": ("full", {"lr": 1.25e-4}),
}


SHOWN = ("r = 1", "r = 8")  # of RUNS, in the picture's right panel
PARTS = (  # without any intruder, rank 1 would be far outside the panel
    ("intruders scaled", "intruders x 1, 0.75, 0.5", 3, OTHER),
    ("change scaled", "whole change x 1, 0.9, 0.8, 0.6", 4, LORA),
)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return by run and seed the number of intruders, and [perplexity, KL], also for each factor
    that scales the intruders or the whole change.
    """
    data = {}
    for name, (method, options) in RUNS.items():
        found = finetune(method, args.seeds, args.short, taken_apart(args.short), **options)
        for run in found:
            run["intruders"] = sum(layer["intruders"] for layer in run["layers"])
            run["weights"] = len(run.pop("layers"))
        data[name] = found
        if found[0]["intruders scaled"]:
            for perplexity, kl in zip(*scaled(found, "intruders scaled"), strict=True):
                same = kl_at(perplexity, found)
                print(f"{name}: {perplexity:.1f}, KL {kl:.3f}; the whole change {same:.3f}")
    return data


def scaled(found: list[dict[str, Any]], part: str) -> tuple[list[float], list[float]]:
    """Return the perplexities and the KLs, averaged over seeds, as this part is scaled down."""
    points = [[run["scores"], *run[part].values()] for run in found]  # (seeds, factors, 2)
    x, y = np.mean(points, axis=0).T
    return x.tolist(), y.tolist()


def kl_at(perplexity: float, found: list[dict[str, Any]]) -> float:
    """Return the KL of the whole change, scaled down to this perplexity. The KL is interpolated
    between the tested factors. Beyond the tested factors, the KL is nan.
    """
    x, y = scaled(found, "change scaled")
    least = int(np.argmin(x))  # on the left of this point, less change learns more
    return float(np.interp(perplexity, x[least:], y[least:], left=np.nan, right=np.nan))


def run_name(name: str) -> str:
    """Return the rank and the rate of a run, for a picture."""
    method, options = RUNS[name]
    rate = f"lr {scientific(options['lr'])}"
    if method == "full":
        return f"full, {rate}"
    layers = "" if "target_modules" in options else "c_attn, "
    return f"{layers}r = {options.get('r', 8)}, {rate}"


def draw(data: dict[str, Any]) -> Any:
    """Draw the intruders of each run. Draw forgetting by perplexity as each part is scaled."""
    count = len(data[SHOWN[0]])
    caption = (
        f"Intruder: one of the {TOP} largest singular vectors of a changed weight, with a cosine "
        f"below {INTRUDER} to each singular vector of the base's weight. LoRA has rank r on all "
        "four layers of a block, except in the first row, and alpha 16. 60 steps of 4 windows of "
        f"128 tokens. Left: mean and range of {describe_seeds(count)}. Right: means."
    )
    figure, (left, right) = panels(
        "Intruder dimensions, and what it costs to scale them down (mini)",
        caption,
        "intruders in all changed weights",
        "forgetting: KL from the base, nats per token",
        height=4.9,
    )
    for row, (name, found) in enumerate(data.items()):
        colour = FULL if name.startswith("full") else LORA
        counts = [run["intruders"] for run in found]
        left.plot([min(counts), max(counts)], [row, row], color=colour, linewidth=4)
        left.plot(mean(counts), row, "o", color=colour)
    left.set_yticks(range(len(data)), map(run_name, data))
    left.invert_yaxis()
    left.set(xlabel="how many of 240 (first row: of 60)")

    for part, label, points, colour in PARTS:
        for name in SHOWN:
            x, y = scaled(data[name], part)
            [line] = right.plot(x[:points], y[:points], ".-", color=colour)
        line.set_label(label)
    right.set_ymargin(0.2)
    for name in SHOWN:
        perplexity, kl = np.mean([run["scores"] for run in data[name]], axis=0)
        [dot] = right.plot(perplexity, kl, "o", color=INK)
        name_line(right, run_name(name), (perplexity, kl), INK, (8, 6))
    dot.set_label("as trained")
    right.set(xlabel="validation perplexity", ylim=(0, None))
    right.legend(loc="lower right")
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("intruders", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
