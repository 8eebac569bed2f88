"""Do dropout and weight decay matter? `python -m lesson.experiments.regularisation`

Varied: the dropout of A's input, and the weight decay of A and B.
Fixed: mini in fp32, the default book, and `--recipe best`: LoRA of rank 8 on all four layers, and
three epochs of batches of 2 windows of 128 tokens without overlap. The rate is 2.7e-3.
Measured: the perplexity of the adapter that `train.py` saves (the best epoch), with three seeds.
"""

import argparse
from collections.abc import Sequence

from lesson.experiments.common import SHORT, as_command, experiment, spread, train_options
from lesson.experiments.sweep import stored
from training.options import BEST

SETTINGS = {
    "dropout 0, weight decay 0.01": (0.0, 0.01),
    "dropout 0.05, weight decay 0.01": (0.05, 0.01),
    "dropout 0.1, weight decay 0.01": (0.1, 0.01),
    "dropout 0.05, weight decay 0": (0.05, 0.0),
    "dropout 0.05, weight decay 0.1": (0.05, 0.1),
}


def run(dropout: float, decay: float, seed: int, short: bool) -> float:
    words = {"device": "cpu", "precision": "fp32", "recipe": BEST, "lr": 2.7e-3, "seed": seed}
    words |= {"lora_dropout": dropout, "weight_decay": decay}
    if short:
        words |= SHORT
    return stored(train_options("lora", words), short)["perplexity"]


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the perplexity with each seed, by setting."""
    data = {}
    for label, (dropout, decay) in SETTINGS.items():
        data[label] = [run(dropout, decay, seed, args.short) for seed in args.seeds]
        print(f"{label}: {spread(data[label])}", flush=True)
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("regularisation", measure, None, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
