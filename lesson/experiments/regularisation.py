"""Do dropout and weight decay matter? `python -m lesson.experiments.regularisation`

Varied: the dropout of A's input, the weight decay of A and B, and the number of epochs.
Fixed: mini in fp32, the default book, and `--recipe best` with its rate: LoRA of rank 8 on all four
layers, batches of 2 windows of 128 tokens without overlap.
Measured: the perplexity of the adapter that `train.py` saves (the best epoch), with three seeds.
"""

import argparse
from collections.abc import Sequence

from lesson.experiments.common import SHORT, experiment, spread, train_options
from lesson.experiments.recipes import stored
from training.options import BEST

SETTINGS = {
    "dropout 0, weight decay 0.01": (0.0, 0.01),
    "dropout 0.05, weight decay 0.01": (0.05, 0.01),
    "dropout 0.1, weight decay 0.01": (0.1, 0.01),
    "dropout 0.05, weight decay 0": (0.05, 0.0),
    "dropout 0.05, weight decay 0.1": (0.05, 0.1),
}
EPOCHS = (3, 6)


def run(dropout: float, decay: float, epochs: int, seed: int, short: bool) -> float:
    words = {"device": "cpu", "precision": "fp32", "recipe": BEST, "seed": seed, "epochs": epochs}
    words |= {"lora_dropout": dropout, "weight_decay": decay}
    if short:
        words |= SHORT
    return stored(train_options("lora", words), short)["perplexity"]


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the perplexity with each seed, by number of epochs and setting."""
    data: dict[str, dict[str, list[float]]] = {}
    for epochs in EPOCHS[:1] if args.short else EPOCHS:
        found = data.setdefault(f"{epochs} epochs", {})
        for label, (dropout, decay) in SETTINGS.items():
            found[label] = [run(dropout, decay, epochs, seed, args.short) for seed in args.seeds]
            print(f"{epochs} epochs, {label}: {spread(found[label])}", flush=True)
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("regularisation", measure, None, __doc__, argv)


if __name__ == "__main__":
    main()
