"""Which learning rate, and what does the model forget? `python -m lesson.experiments.learning_rate`

Varied: the peak learning rate, for LoRA on c_attn at rank 8 and for full fine-tuning.
Fixed: mini, the default book, 60 steps of 8 windows of 64 tokens, three seeds.
Measured: what was learned, by the validation perplexity; what was forgotten, by the mean
KL(base || model) per token, in nats, on 32 texts of 64 tokens that the base wrote.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.figures import BASE, FULL, LORA
from lesson.experiments.common import Trainer, band, panels, parse, save, trainer
from lesson.experiments.forgetting import forgotten
from lesson.experiments.sweep import finetune, perplexity, train

METHODS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "lora": ("LoRA, c_attn, rank 8", LORA, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "full": ("full fine-tuning", FULL, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
}


def learned_and_forgotten(short: bool) -> Callable[[Trainer], tuple[float, float]]:
    """Return a measure: the perplexity on the book, and the KL from the base on its texts."""

    def learned_and_forgotten(made: Trainer) -> tuple[float, float]:
        train(made)
        return perplexity(made), forgotten(made.model, made.device, short)

    return learned_and_forgotten


def draw(data: dict[str, Any]) -> Any:
    """Draw perplexity by learning rate, and forgetting against perplexity."""
    figure, (left, right) = panels("Learning and forgetting, by peak rate (mini)", "", "")
    for method, (label, colour, _) in METHODS.items():
        runs = data[method]
        y = torch.tensor(list(runs.values()))  # (rates, seeds, 2): perplexity, KL
        means = y.mean(1)  # (rates, 2)
        band(left, list(runs), y[..., 0].T, colour, label)
        right.plot(means[:, 0], means[:, 1], ".-", color=colour, label=label)
        for lr, place in zip(runs, means, strict=True):
            right.annotate(
                f"{lr:g}",
                place,
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                bbox={"facecolor": "w", "edgecolor": "none", "alpha": 0.8, "pad": 0},
            )
    left.axhline(data["base"], color=BASE, linestyle="--", label="the base")
    left.set(xscale="log", xlabel="peak learning rate", ylabel="perplexity", ylim=(20, 75))
    left.legend(loc="upper right")
    right.set(
        yscale="log",
        xlabel="perplexity on the book (labels: peak learning rate)",
        ylabel="KL from the base on its texts, nats/token",
        xmargin=0.15,
    )
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    base = trainer(precision="auto", short=args.short, block_size=64)  # B is zero: the base
    measure = learned_and_forgotten(args.short)

    data: dict[str, Any] = {"base": base.evaluate().perplexity}
    for method, (_, _, rates) in METHODS.items():
        if args.short:
            rates = rates[::3]
        data[method] = {
            lr: finetune(method, args.seeds, args.short, measure, lr=lr) for lr in rates
        }
    return save(args, "learning_rate", data, draw(data))


if __name__ == "__main__":
    main()
