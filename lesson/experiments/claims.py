"""Five claims of later papers, on mini: `python -m lesson.experiments.claims`

alpha (arXiv 2606.12883): alpha does what no learning rate can do.
batch (2602.09492): papers disagree about variants because the best batch size differs.
forgetting (2509.04259, 2602.00722): the KL on the new text predicts forgetting, and so does the
share of the change in its largest singular direction.
memory (2605.30260): the loss that LoRA learns to save on random text grows as r^a length^-b.

Fixed: mini, LoRA on all four layers and AdamW. The first two parts tune the rate in factors of two.
Measured: the validation perplexity; the KL from the base; the share of random tokens recalled.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.figures import FULL, LORA, shades
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
from lora import LoRAConfig, inject
from model.gpt2 import IGNORE_INDEX
from train import learning_rate
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

KEY = 4  # tokens that are given, and not scored
PASSAGE = 32  # tokens that are scored
PASSAGES = (1, 4, 16)
MEMORY_RANKS = (1, 4, 16)
MEMORY_STEPS = 120
MEMORY_RATES = (4e-3, 1.6e-2)


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


def memorise(tokens: Tensor, r: int, lr: float, steps: int) -> dict[str, float]:
    """Train on passages of random tokens (N, KEY + T). Return the loss before and after in nats per
    token, and the share of passages that greedy decoding recalls from their first KEY tokens.
    """
    model = load_base()
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    scored = targets[:, KEY - 1 :].numel()
    targets[:, : KEY - 1] = IGNORE_INDEX
    torch.manual_seed(0)
    inject(model, LoRAConfig(r=r, lora_alpha=16, lora_dropout=0.0, target_modules=ALL))
    model.eval()  # switches off the base's dropouts
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(min(step, steps - 1), steps, lr, warmup_ratio=0.06)
        loss = model.loss(inputs, targets) / scored
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if step < steps:
            optimizer.step()
    # Greedy decoding recalls a passage if each token is the likeliest after the tokens before it.
    _, right = model.token_losses(inputs, targets)
    return {
        "before": losses[0],
        "after": losses[-1],
        "recalled": right[:, KEY - 1 :].all(1).float().mean().item(),
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Return the result with the rate of the lowest loss, by rank and number of passages."""
    data: dict[str, Any] = {}
    steps = 2 if args.short else MEMORY_STEPS
    for r in MEMORY_RANKS:
        for count in PASSAGES:
            generator = torch.Generator().manual_seed(1)
            size = (count, KEY + PASSAGE)
            # The first 256 tokens are bytes. mini never saw many of them.
            most = load_base().config.vocab_size
            tokens = torch.randint(256, most, size, generator=generator)
            tried = [memorise(tokens, r, lr, steps) for lr in MEMORY_RATES]
            best = min(tried, key=lambda result: result["after"])
            data[f"{r}, {count * PASSAGE}"] = best
            print(f"rank {r}, {count * PASSAGE} tokens: {best}", flush=True)
    return data


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results of the four parts."""
    return {
        "forgetting": forgetting(args),
        "alpha": alpha(args),
        "batch": batch(args),
        "memory": memory(args),
    }


def draw(data: dict[str, Any]) -> Any:
    """Draw forgetting by the KL on the book, and the perplexity of each variant by batch."""
    figure, (left, right) = panels(
        "Two later claims (mini)",
        "forgetting by the KL on the book, nats",
        "perplexity by windows per step, at the best rate",
    )
    for method, colour in (("lora", LORA), ("full", FULL)):
        runs = [run for run in data["forgetting"] if run["method"] == method]
        x = [run[PREDICTORS[0]] for run in runs]
        left.plot(x, [run["forgetting"] for run in runs], "o", color=colour, label=method)
    left.legend()
    for (name, batches), colour in zip(
        data["batch"].items(), shades(LORA, len(VARIANTS)), strict=True
    ):
        means = [float(np.mean(runs[best_rate(runs)])) for runs in batches.values()]
        right.plot(range(len(means)), means, ".-", color=colour, label=name)
    right.set_xticks(range(len(BATCHES)), list(BATCHES))
    right.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("claims", measure, draw, __doc__, argv)


if __name__ == "__main__":
    main()
