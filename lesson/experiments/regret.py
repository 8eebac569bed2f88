"""Does LoRA equal full fine-tuning? `python -m lesson.experiments.regret`

Varied: the method and LoRA's rank; at equal windows the batch, and so the steps; at equal steps the
share of the book that is read, and so the passes over it.
Fixed: mini, LoRA on all four layers, alpha 16, 480 windows of 64 tokens.
Measured: the best of three validation perplexities, and the training loss over the last third, each
at its own best rate, with three seeds.
"""

import argparse
from typing import Any

from lesson.experiments.sweep import ALL, Runs, at_best, scored, training_loss, tune

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "r = 64": ("lora", {"r": 64, "target_modules": ALL}),
    "r = 8": ("lora", {"r": 8, "target_modules": ALL}),
    "r = 1": ("lora", {"r": 1, "target_modules": ALL}),
}

# By batch: the steps that read 480 windows, and the rates to begin with, for full and for LoRA.
BATCHES = {2: (240, 5e-4, 4e-3), 8: (60, 1e-3, 8e-3), 32: (15, 2e-3, 1.6e-2)}
# By the stride of the windows: the share of the book that is read, and the rates to begin with.
SHARES = {64: ("all", 5e-4, 4e-3), 256: ("a quarter", 2.5e-4, 2e-3), 1024: ("a 16th", 2.5e-4, 1e-3)}


def by_batch(args: argparse.Namespace) -> dict[str, dict[int, Runs]]:
    """Return by method and batch the perplexities at each rate."""
    data: dict[str, dict[int, Runs]] = {}
    for name in ("full", "r = 64", "r = 8"):
        method, options = METHODS[name]
        data[name] = {}
        for batch, (steps, full_guess, guess) in BATCHES.items():
            if method == "full":
                guess = full_guess
            size = {"batch_size": batch, "max_steps": steps}
            runs = tune(method, guess, args.seeds, args.short, score=at_best, **size, **options)
            data[name][batch] = scored(runs, at_best)
    return data


def by_share(args: argparse.Namespace) -> dict[str, dict[int, dict[str, Runs]]]:
    """Return by method and stride what was measured at each rate, tuned for either measure."""
    data: dict[str, dict[int, dict[str, Runs]]] = {}
    for name, (method, options) in METHODS.items():
        data[name] = {}
        for stride, (_, full_guess, guess) in SHARES.items():
            if method == "full":
                guess = full_guess
            size = {"batch_size": 2, "max_steps": 240, "stride": stride}
            found = {}
            for label, score in (("validation", at_best), ("training", training_loss)):
                runs = tune(method, guess, args.seeds, args.short, score=score, **size, **options)
                found[label] = scored(runs, score)
            data[name][stride] = found
    return data


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return {"by batch": by_batch(args), "by share": by_share(args)}
