"""How should A and B start? `python -m lesson.experiments.initialisation`

Varied: which of A and B start at random, and which start at zero.
Fixed: mini, LoRA on c_attn at rank 8, AdamW at lr 2e-3, 12 steps of 4 windows of 128 tokens.
Measured before each step, with three seeds: the loss minus the base's loss on the same windows, and
the norms of the gradients of A and B.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from common.figures import BASE, INK, LORA, scientific
from lesson.experiments.common import (
    SEEDS,
    as_command,
    band,
    describe_seeds,
    experiment,
    gradient,
    mean_loss,
    panels,
    trainer,
)
from lesson.figures import OTHER, draw_at, shades
from lora.inject import adapter_disabled

# name: which of A and B are random, and the colour
OTHERS = shades(OTHER, 2)
STARTS = {
    "A random, B zero (LoRA)": ("A", LORA),
    "A zero, B random": ("B", OTHERS[1]),
    "both random": ("AB", OTHERS[0]),
    "both zero": ("", BASE),
}
LR = 2e-3
STEPS = 12
TITLES = {
    "loss": "loss minus the base's, nats per token",
    "B": "norm of B's gradient (log above 0.01)",
    "A": "norm of A's gradient (log above 0.01)",
}


def start(parameters: dict[str, nn.Parameter], random: str) -> dict[str, list[nn.Parameter]]:
    """Draw the factors in `random` at random, and set the others to zero. Return both by name."""
    weights: dict[str, list[nn.Parameter]] = {"A": [], "B": []}
    for name, parameter in parameters.items():
        part = "A" if "lora_A" in name else "B"
        weights[part].append(parameter)
        if part in random:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        else:
            nn.init.zeros_(parameter)
    return weights


def gradient_norm(parameters: Sequence[Tensor]) -> float:
    """Return the norm of all gradients together."""
    return math.hypot(*[gradient(parameter).norm().item() for parameter in parameters])


def first_steps(random: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Train. Return the loss minus the base's loss, and both gradient norms, before each step."""
    made = trainer(seed=seed, batch_size=4, stride=128, max_steps=steps)
    weights = start(made.parameters, random)
    optimizer = torch.optim.AdamW(made.parameters.values(), lr=LR)

    measured: dict[str, list[float]] = {"loss": [], "A": [], "B": []}
    for batch in made.batches():
        with torch.no_grad(), adapter_disabled(made.model):
            base = mean_loss(made, batch).item()
        loss = mean_loss(made, batch)
        loss.backward()

        measured["loss"].append(loss.item() - base)
        for part, parameters in weights.items():
            measured[part].append(gradient_norm(parameters))

        optimizer.step()
        optimizer.zero_grad()
    return measured


def measure() -> dict:
    runs = {}
    for name, (random, _) in STARTS.items():
        runs[name] = [first_steps(random, seed, STEPS) for seed in SEEDS]
    return {"lr": LR, "steps": STEPS, "seeds": len(SEEDS), "runs": runs}


def draw(data: dict[str, Any]) -> Any:
    """Draw the losses and both norms, one below the other."""
    steps = data["steps"]
    caption = (
        f"LoRA on c_attn at rank 8, AdamW at lr {scientific(LR)}, 4 windows of 128 tokens per "
        f"step. Lines and bands: means and ranges of {describe_seeds(data['seeds'])}."
    )
    title = f"Four starts of A and B, before each of the first {steps} steps (mini)"
    figure, axes = panels(title, caption, *TITLES.values(), stacked=True, height=7)
    for axis, part in zip(axes, TITLES, strict=True):
        for name, (_, colour) in STARTS.items():
            y = torch.tensor([run[part] for run in data["runs"][name]])  # (seeds, steps)
            band(axis, range(steps), y, colour, name)
        if part != "loss":  # shows zero and also far larger values
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set_ylim(-0.001, 10)
            draw_at(axis.yaxis, (0, 0.01, 0.1, 1))

    loss, b, a = axes
    first = [run["B"][0] for run in data["runs"]["A random, B zero (LoRA)"]]
    point_out(b, "LoRA: B moves first", (0, max(first)), (1.5, 0.012))
    point_out(
        a,
        "LoRA: A's first gradient is zero;\nit moves from the second step on",
        (0, 0),
        (1.5, 0.01),
    )
    random = mean(run["loss"][0] for run in data["runs"]["both random"])
    point_out(loss, "both random: damaged before\nthe first step", (0, random), (1.5, random))
    loss.legend()
    a.set_xlabel("steps taken")
    draw_at(a.xaxis, range(steps))
    return figure


def point_out(
    axis: Any, words: str, place: tuple[float, float], words_at: tuple[float, float]
) -> None:
    """Write words, and an arrow from the words to a data point."""
    arrow = {"arrowstyle": "->", "color": INK}
    axis.annotate(words, place, words_at, va="center", arrowprops=arrow)


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("initialisation", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
