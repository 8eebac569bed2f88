"""Learning and forgetting, by learning rate: `python -m lesson.experiments.learning_rate`."""

import torch
from torch import Tensor

from lesson.experiments.common import BLUE, GREY, RED, Trainer, band, panels, parse, save, trainer
from lesson.experiments.sweep import finetune

METHODS = {
    "lora": ("LoRA, c_attn, rank 8", RED, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "full": ("full fine-tuning", BLUE, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
}


def log_probabilities(made: Trainer, texts: Tensor) -> Tensor:
    """Return log p of every next token after every token of the texts, (texts, tokens, V)."""
    with torch.no_grad(), made.device.autocast():
        return made.model(texts).float().log_softmax(-1)


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    made = trainer(precision="auto", short=args.short, block_size=64)  # B is zero: the base
    count, tokens = (4, 16) if args.short else (32, 64)
    texts = torch.full((count, 1), made.tokenizer.end_of_text)
    while texts.size(1) < tokens:
        last = log_probabilities(made, texts)[:, -1]  # (texts, V)
        texts = torch.cat((texts, torch.multinomial(last.exp(), 1)), dim=1)
    base = log_probabilities(made, texts)

    def measure(made: Trainer) -> tuple[float, float]:
        """Return the book's perplexity, and KL(base || model) on the base's texts, nats a token."""
        gap = base - log_probabilities(made, texts)
        return made.evaluate().perplexity, (base.exp() * gap).sum(-1).mean().item()

    data = {"base": made.evaluate().perplexity}
    figure, (left, right) = panels("Learning and forgetting, by peak rate (mini)", "", "")
    for method, (label, colour, rates) in METHODS.items():
        runs = data[method] = {
            lr: finetune(method, args.seeds, args.short, measure, lr=lr)
            for lr in (rates[::3] if args.short else rates)
        }
        y = torch.tensor([*runs.values()])  # (rates, seeds, 2)
        band(left, [*runs], y[..., 0].T, colour, label)
        right.plot(*y.mean(1).T, ".-", color=colour, label=label)
        for lr, place in zip(runs, y.mean(1), strict=True):
            right.annotate(
                f"{lr:g}",
                place,
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                bbox={"facecolor": "w", "edgecolor": "none", "alpha": 0.8, "pad": 0},
            )
    left.axhline(data["base"], color=GREY, linestyle="--", label="the base")
    left.set(xscale="log", xlabel="peak learning rate", ylabel="perplexity", ylim=(20, 75))
    right.set(
        yscale="log",
        xlabel="perplexity on the book (labels: peak learning rate)",
        ylabel="KL from the base on its texts, nats/token",
        xmargin=0.15,
    )
    left.legend(loc="upper right")
    return save(args, "learning_rate", data, figure)


if __name__ == "__main__":
    main()
