"""Learning and forgetting, by learning rate, LoRA and full: `python -m experiments.learning_rate`.

Rank 8 on mini's c_attn, and every weight; the same windows, batch and steps for both. Learning is
the perplexity on the book; forgetting is how far the model's predictions have moved from the
base's on texts that the base itself wrote.
"""

import torch

from experiments.common import BLUE, RED, panels, parse, save, trainer
from experiments.sweep import curve, finetune, perplexity

RATES = {"lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}
SHORT = {"lora": (3e-4, 1e-2), "full": (3e-5, 1e-3)}
STYLES = {"lora": ("LoRA, c_attn, rank 8", RED), "full": ("full fine-tuning", BLUE)}


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv, seeds=3)
    made = trainer(precision="bf16")  # B is zero: the base
    texts = torch.full((32, 1), made.tokenizer.end_of_text)
    with made.device.autocast():
        while texts.size(1) < 64:
            last = made.model(texts)[:, -1].float()  # (32, V)
            texts = torch.cat((texts, torch.multinomial(last.softmax(-1), 1)), dim=1)
        base = made.model(texts).float().log_softmax(-1)  # (32, 64, V)

    @torch.no_grad()
    def measure(made) -> tuple[float, float]:
        """The perplexity on the book, and KL(base || model) on the base's texts, nats a token."""
        with made.device.autocast():
            log_p = made.model(texts).float().log_softmax(-1)
        return perplexity(made), (base.exp() * (base - log_p)).sum(-1).mean().item()

    data, (figure, (left, right)) = {}, panels(2, "Learning and forgetting (mini, 60 steps)")
    for method, rates in (SHORT if args.short else RATES).items():
        with torch.enable_grad():
            runs = data[method] = {lr: finetune(method, args.seeds, args.short, measure, lr=lr)
                                   for lr in rates}
        label, colour = STYLES[method]
        curve(left, {lr: [book for book, _ in runs[lr]] for lr in runs}, colour, label)
        book, forgotten = torch.tensor(list(runs.values())).mean(1).T
        right.plot(book, forgotten, ".-", color=colour, label=label)
        for lr, *place in zip(runs, book, forgotten, strict=True):
            right.annotate(f"{lr:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="perplexity on the book")
    right.set(yscale="log", xlabel="perplexity on the book (left is learnt)",
              ylabel="KL from the base on its own texts, nats")
    left.legend()
    save(args, "learning_rate", data, figure)
    return data


if __name__ == "__main__":
    main()
