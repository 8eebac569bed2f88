"""Four claims of later papers, on mini: `python -m lesson.experiments.claims`

alpha (arXiv 2606.12883): alpha does what no learning rate can do.
batch (2602.09492): papers disagree about variants because the best batch size differs.
forgetting (2509.04259, 2602.00722): the KL on the new text predicts forgetting, and so does the
share of the change in its largest singular direction.

Fixed: mini and AdamW. In the parts alpha and batch, LoRA on all four layers, with a rate that is
tuned in factors of two.
Measured: the validation perplexity, and the KL from the base.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.figures import FULL, LORA, OTHER, shades
from lesson.experiments.changes import changes, is_layer, load_base
from lesson.experiments.common import Trainer, experiment, panels
from lesson.experiments.forgetting import forgotten, log_probabilities
from lesson.experiments.sweep import (
    ALL,
    at_best,
    best_rate,
    finetune,
    perplexity,
    scored,
    train,
    tune,
)
from training.scores import kl_divergence

ALPHAS = {16: 8e-3, 128: 2e-3, 512: 1e-3}  # alpha, and the first rate to try
RANKS = (8, 64)

# batch: the steps that read 480 windows. Variant: options, and the first rate for a batch of 8.
BATCHES = {2: 240, 8: 60, 32: 15}
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA": ({}, 8e-3),
    "PiSSA": ({"init_lora_weights": "pissa"}, 2e-3),
    "LoRA+": ({"loraplus_lr_ratio": 16.0}, 1e-3),
}

FORGETTING: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": r, "lr": lr, "target_modules": ALL})
    for r in (8, 64)
    for lr in (1e-3, 2e-3, 4e-3, 8e-3)
]
FORGETTING += [("lora", {"r": 8, "lr": lr}) for lr in (4e-3, 8e-3, 1.6e-2)]
FORGETTING += [("full", {"lr": lr}) for lr in (6e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)]
PREDICTORS = ("KL on the book", "share of the largest direction", "size of the change")


def alpha(args: argparse.Namespace) -> dict[str, Any]:
    """Return the perplexities by rank, alpha and rate."""
    data: dict[str, Any] = {}
    for r in RANKS:
        data[f"{r}"] = {}
        for value, guess in ALPHAS.items():
            options: dict[str, Any] = {"r": r, "lora_alpha": value, "target_modules": ALL}
            runs = tune("lora", guess, args.seeds, args.short, score=at_best, **options)
            data[f"{r}"][value] = scored(runs, at_best)
    return data


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Return the perplexities by variant, batch and rate."""
    data: dict[str, Any] = {}
    for name, (variant, guess) in VARIANTS.items():
        data[name] = {}
        for size, steps in BATCHES.items():
            options: dict[str, Any] = {
                "batch_size": size,
                "max_steps": steps,
                "target_modules": ALL,
                **variant,
            }
            first = guess / 2 if size == 2 else guess
            runs = tune("lora", first, args.seeds, args.short, score=at_best, **options)
            data[name][size] = scored(runs, at_best)
    return data


def forecast(made: Trainer) -> dict[str, float]:
    """Train. Return the forgetting, and three numbers that may predict it."""
    base = load_base()
    weights = {name: p.detach() for name, p in base.named_parameters()}
    train(made)
    change = {n: dw for n, dw in changes(made, weights).items() if is_layer(n)}
    spectra = [torch.linalg.svdvals(dw).square() for dw in change.values()]
    inputs, _ = next(made.data.validation.evaluation_batches(32))
    before = log_probabilities(base, inputs, made.device)
    after = log_probabilities(made.model.eval(), inputs, made.device)
    share = sum((s[0] / s.sum()).item() for s in spectra) / len(spectra)
    return {
        "perplexity": perplexity(made),
        "forgetting": forgotten(made.model, made.device, False),
        PREDICTORS[0]: kl_divergence(before, after).mean().item(),
        PREDICTORS[1]: share,
        PREDICTORS[2]: math.sqrt(sum(s.sum().item() for s in spectra)),
    }


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Return Spearman's correlation: the correlation of the ranks of two lists without ties."""
    ranks = torch.tensor([x, y]).argsort().argsort().double()  # (2, N)
    return torch.corrcoef(ranks)[0, 1].item()


def forgetting(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the result of `forecast` for each run."""
    found = []
    for method, options in FORGETTING[: 2 if args.short else None]:
        [result] = finetune(method, (0,), args.short, forecast, **options)
        found.append({"method": method, **options, **result})
    for name in PREDICTORS:
        x, y = ([run[key] for run in found] for key in (name, "forgetting"))
        print(f"{name}: rank correlation {rank_correlation(x, y):.2f}")
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the three parts."""
    return {
        "forgetting": forgetting(args),
        "alpha": alpha(args),
        "batch": batch(args),
    }


def draw(data: dict[str, Any]) -> Any:
    """Draw forgetting by the KL on the book, and the perplexity of each variant by batch."""
    figure, (left, right) = panels(
        "Two later claims (mini)",
        "forgetting: KL on the base's texts, nats",
        "perplexity at the best rate",
    )
    groups: dict[str, list[dict[str, Any]]] = {
        "full": [],
        "LoRA, all layers": [],
        "LoRA, c_attn": [],
    }
    for run in data["forgetting"]:
        name = "LoRA, all layers" if "target_modules" in run else "LoRA, c_attn"
        groups["full" if run["method"] == "full" else name].append(run)
    for (name, runs), colour in zip(groups.items(), (FULL, LORA, OTHER), strict=True):
        x = [run[PREDICTORS[0]] for run in runs]
        left.plot(x, [run["forgetting"] for run in runs], "o", color=colour, label=name)
    left.set_xlabel("KL on the book, nats")
    left.legend()
    for (name, batches), colour in zip(
        data["batch"].items(), shades(LORA, len(VARIANTS)), strict=True
    ):
        means = [float(np.mean(runs[best_rate(runs)])) for runs in batches.values()]
        right.plot(range(len(means)), means, ".-", color=colour, label=name)
    right.set_xticks(range(len(BATCHES)), list(BATCHES))
    right.set_xlabel("windows per step")
    right.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("claims", measure, draw, __doc__, argv)


if __name__ == "__main__":
    main()
