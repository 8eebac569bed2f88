"""Train and analyse the change of the weights: intruders, amplification, and scaling.

Several experiments share these functions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapters.inspect import INTRUDER, cosines, projected_norm
from common.device import Device
from evaluation.scores import evaluate
from lesson.experiments.common import Steps, trainer
from lesson.experiments.forgetting import forgotten
from lesson.experiments.sweep import SIZE, train
from lora.inject import lora_layers
from model.gpt2 import GPT2
from model.kernels.fast import set_kernels
from storage.hub import find_base
from storage.weights import load_gpt2

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
TOP = 64  # the number of a change's directions that are analysed
INTRUDER_FACTORS = (0.75, 0.5, 0.0)
CHANGE_FACTORS = (0.9, 0.8, 0.6)

Weights = dict[str, Tensor]


def intruder_part(weight: Tensor, changed: Tensor) -> Tensor:
    """Return the part of the intruders in the changed weight: the sum of s u v^T."""
    u, s, vh = torch.linalg.svd(changed, full_matrices=False)
    found = (cosines(weight, changed) < INTRUDER).nonzero().flatten()
    return (u[:, found] * s[found]) @ vh[found]


def load_base() -> GPT2:
    """Return mini in fp32."""
    _, directory = find_base("mini")
    model = load_gpt2(directory)
    set_kernels(model, "fast")
    return model


def changes(made: Steps, base: Weights) -> Weights:
    """Return the change of every changed parameter."""
    layers = lora_layers(made.model)
    if layers:
        return {f"{name}.weight": layer.delta_weight() for name, layer in layers.items()}
    return {name: p.detach() - base[name] for name, p in made.model.named_parameters()}


def is_layer(name: str) -> bool:
    """Return whether a parameter is the weight of one of the four layers of a block."""
    return name.endswith(tuple(f"{layer}.weight" for layer in LAYERS))


def tuned(method: str, seed: int, short: bool) -> tuple[Steps, Weights]:
    """Train 60 steps of 4 windows of 128 tokens: "LoRA" on c_attn at lr 8e-3, or "full" at 1e-3.

    Returns the trainer, and the change of each changed block matrix by name.
    """
    lr = {"LoRA": 8e-3, "full": 1e-3}[method]
    made = trainer(method.lower(), seed, short=short, lr=lr, **SIZE)
    base = {name: p.detach() for name, p in load_base().named_parameters()}
    train(made)
    return made, {name: dw for name, dw in changes(made, base).items() if is_layer(name)}


def described(name: str, weight: Tensor, change: Tensor) -> dict[str, Any]:
    """Return the effect of one weight's change on its singular vectors.

    The number of directions is the rank of the change, at most TOP.
    """
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    rank = min(TOP, int((s > 1e-5 * s[0]).sum()))
    own_u, _, own_vh = torch.linalg.svd(weight, full_matrices=False)
    found = cosines(weight, weight + change)
    return {
        "layer": name,
        "intruders": int((found < INTRUDER).sum()),
        "cosine": found.min().item(),
        "change": s[:rank].norm().item(),
        "weight": weight.norm().item(),
        "weight in the change's directions": projected_norm(weight, u[:, :rank], vh[:rank]),
        "weight in its own": projected_norm(weight, own_u[:, :rank], own_vh[:rank]),
    }


def taken_apart(short: bool) -> Callable[[Steps], dict[str, Any]]:
    """Return a measure of the perplexity, the forgetting and the singular vectors of every layer.
    Perplexity and forgetting are measured again with the intruders, or the whole change, scaled
    down. Everything except the training runs in fp32.
    """

    def change_taken_apart(made: Steps) -> dict[str, Any]:
        train(made)
        model = load_base()
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        change = changes(made, base)
        layers = [described(n, base[n], dw) for n, dw in change.items() if is_layer(n)]

        def cost(scaled: Weights) -> list[float]:
            return scores(made, model, base | scaled, short)

        whole = {name: base[name] + dw for name, dw in change.items()}
        intruding = [layer["layer"] for layer in layers if layer["intruders"]]
        parts = {name: intruder_part(base[name], whole[name]) for name in intruding}
        of_intruders = {}
        for factor in INTRUDER_FACTORS if parts else ():
            scaled = {name: whole[name] - (1 - factor) * part for name, part in parts.items()}
            of_intruders[factor] = cost(whole | scaled)
        of_change = {}
        for factor in CHANGE_FACTORS:
            of_change[factor] = cost({n: base[n] + factor * dw for n, dw in change.items()})
        return {
            "scores": cost(whole),
            "layers": layers,
            "intruders scaled": of_intruders,
            "change scaled": of_change,
        }

    return change_taken_apart


@torch.no_grad()
def scores(made: Steps, model: GPT2, weights: Weights, short: bool) -> list[float]:
    """Return the book's perplexity, and the KL from the base, of a model with these weights."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    device = Device.pick("cpu", "fp32")
    perplexity = evaluate(model, made.data.validation, device).perplexity
    return [perplexity, forgotten(model, short)]
