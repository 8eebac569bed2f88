"""Which learning rate, and how much is forgotten? `python -m lesson.experiments.learning_rate`

Varied: the peak learning rate, for LoRA on c_attn at rank 8 and for full fine-tuning.
Fixed: mini, the default book, 60 steps of 4 windows of 128 tokens, three seeds.
Measured: the validation perplexity (learning), and the mean KL(base || model) per token, in nats,
on 16 texts of 128 tokens that the base wrote (forgetting).
"""

from collections.abc import Sequence
from typing import Any

import torch

from common.figures import BASE, FULL, INK, LORA, scientific
from lesson.experiments.common import (
    SEEDS,
    Steps,
    as_command,
    band,
    describe_seeds,
    experiment,
    panels,
    trainer,
)
from lesson.experiments.forgetting import forgotten
from lesson.experiments.sweep import finetune, perplexity, train
from lesson.figures import draw_at, name_line

METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "lora": (LORA, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "full": (FULL, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
}
NAMES = {"lora": "LoRA, c_attn, rank 8", "full": "full fine-tuning"}


def learned_and_forgotten(made: Steps) -> tuple[float, float]:
    """Train. Return the perplexity on the book, and the KL on texts of the base."""
    train(made)
    return perplexity(made), forgotten(made.model)


def draw(data: dict[str, Any]) -> Any:
    """Draw perplexity by learning rate, and forgetting against perplexity."""
    count = len(next(iter(data["lora"].values())))
    caption = (
        f"Means of {describe_seeds(count)} (band: range), 60 steps of 4 windows of 128 tokens. "
        "Forgetting: on 16 texts that the base wrote."
    )
    figure, (left, right) = panels(
        "Learning and forgetting, by peak learning rate (mini)",
        caption,
        "perplexity on the book",
        "forgetting: KL from the base, nats/token (log)",
    )
    for method, (colour, _) in METHODS.items():
        runs = {float(lr): seeds for lr, seeds in data[method].items()}
        y = torch.tensor(list(runs.values()))  # (rates, seeds, 2): perplexity, KL
        band(left, list(runs), y[..., 0].T, colour)
        means = y.mean(1)  # (rates, 2)
        name_line(left, NAMES[method], (min(runs), means[0, 0].item()), colour, (8, 6))
        right.plot(means[:, 0], means[:, 1], ".-", color=colour)
        best = means[:, 0].argmin().item()
        for i, lr in enumerate(runs):  # beyond the best rate, the curve turns to the right
            offset, side = ((-7, 0), "right") if i == best else ((7, 4), "left")
            name_line(right, scientific(lr), tuple(means[i].tolist()), colour, offset, side)

    left.axhline(data["base"], color=BASE, linestyle="--")
    left.set(xscale="log", xlabel="peak learning rate", ylim=(20, 1.1 * data["base"]))
    rates = sorted(float(lr) for lr in data["lora"] | data["full"])
    draw_at(left.xaxis, rates, [scientific(lr) for lr in rates])
    name_line(left, "the base", (rates[0], data["base"]), BASE, (0, 8))

    right.set(
        yscale="log", xlabel="perplexity on the book (numbers: peak learning rate)", xmargin=0.15
    )
    draw_at(right.yaxis, (0.05, 0.1, 0.2, 0.5, 1, 2))
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.8}
    right.annotate("better", (0.02, 0.03), (0.18, 0.16), xycoords="axes fraction", arrowprops=arrow)
    return figure


def measure() -> dict[str, Any]:
    base = trainer()  # the base, as B is zero
    data: dict[str, Any] = {"base": base.evaluate().perplexity}
    for method, (_, rates) in METHODS.items():
        data[method] = {lr: finetune(method, SEEDS, learned_and_forgotten, lr=lr) for lr in rates}
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("learning_rate", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
