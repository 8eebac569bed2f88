"""How far does a first step of AdamW move W? `python -m lesson.experiments.first_step`

Varied: the rank, alpha (16, or twice the rank) and the model (mini on the book, and a model of
GPT-2 124M's shapes with random weights on random tokens).
Fixed: all four layers of each block, one step on 512 tokens, no weight decay. Results are in units
of the learning rate.
Measured: the root mean square (rms) of the change of W, beside s sqrt(r / (3 in)) by hand, for the
first c_attn and the first mlp.c_proj. Also measured: the fall of the loss, to first order.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lesson.experiments.common import as_command, experiment, gradient, trainer
from lora.config import LoRAConfig
from lora.inject import inject, lora_layers
from lora.targets import find_targets
from model.gpt2 import GPT2, GPT2Config
from storage.hub import MINI
from storage.weights import load_gpt2

RANKS = (1, 8, 64)
SHOWN = ("h.0.attn.c_attn", "h.0.mlp.c_proj")
COLUMNS = ("trained", "r", "alpha", "by hand", "c_attn", "by hand", "c_proj", "loss falls by")
ROW = "{:12} {:>3} {:>6} {:>9} {:>7} {:>9} {:>7} {:>14}"


def config_of(r: int, alpha: float) -> LoRAConfig:
    targets = ("c_attn", "c_proj", "c_fc")
    return LoRAConfig(r=r, lora_alpha=alpha, lora_dropout=0, target_modules=targets)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def backward(model: GPT2, ids: Tensor) -> None:
    """Compute the gradients of the mean loss of the windows `ids` (B, T + 1)."""
    logits = model(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()


def lora_step(model: GPT2, ids: Tensor, config: LoRAConfig) -> tuple[dict[str, float], float]:
    """Take a first step at rate 1. Return the rms of each shown layer's change, and the gain.

    B starts at zero, so only B has a gradient. AdamW moves each number of B by 1 against the
    gradient. To first order, the loss falls by the sum of |dB|.
    """
    torch.manual_seed(0)
    inject(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, eps=1e-12, weight_decay=0.0)
    backward(model, ids)
    optimizer.step()

    layers = lora_layers(model)
    moved = {name: rms(layers[name].delta_weight()) for name in SHOWN}
    gains = [gradient(layer.lora_B.weight).abs().sum().item() for layer in layers.values()]
    return moved, sum(gains)


def full_gain(model: GPT2, ids: Tensor) -> float:
    """Return how much the loss falls in a first step at rate 1 on the weights of these layers."""
    names = find_targets(model, config_of(8, 16))
    backward(model, ids)
    gains = [gradient(model.get_parameter(f"{name}.weight")).abs().sum().item() for name in names]
    return sum(gains)


def mini_and_windows() -> tuple[GPT2, Tensor]:
    """Return mini and 4 windows of the book, (4, 129)."""
    data = trainer(stride=128).data.training
    inputs, targets = data.inputs_and_targets(data.epoch_order(0, 0)[:4])  # (4, 128) each
    return load_gpt2(MINI), torch.cat((inputs, targets[:, -1:]), dim=1)


def random_gpt2_and_tokens() -> tuple[GPT2, Tensor]:
    """Return a GPT-2 124M with random weights, and random tokens (4, 129)."""
    torch.manual_seed(0)
    config = GPT2Config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    return GPT2(config), torch.randint(config.vocab_size, (4, 129))


def first_steps(make: Callable[[], tuple[GPT2, Tensor]]) -> dict[str, dict[str, float]]:
    """Take a first step of each kind with a new model. Print and return a row for each step."""
    model, ids = make()
    gain = full_gain(model, ids)
    print(ROW.format("the matrices", "", "", "1", "1", "1", "1", f"{gain:.1f}"))
    found = {"full": {"gain": gain}}
    for r in RANKS:
        for alpha in sorted({16, 2 * r}):
            model, ids = make()
            config = config_of(r, alpha)
            by_hand = []
            for name in SHOWN:
                fan_in = model.get_parameter(f"{name}.weight").size(1)
                by_hand.append(config.scaling * math.sqrt(r / (3 * fan_in)))
            moved, gain = lora_step(model, ids, config)

            numbers = []
            for predicted, name in zip(by_hand, SHOWN, strict=True):
                numbers += [f"{predicted:.3f}", f"{moved[name]:.3f}"]
            print(ROW.format("A and B", r, alpha, *numbers, f"{gain:.2f}"), flush=True)
            found[f"r = {r}, alpha {alpha}"] = moved | {"gain": gain}
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    models = {"mini": mini_and_windows}
    if not args.short:
        models["GPT-2 124M, random weights"] = random_gpt2_and_tokens

    found = {}
    for name, make in models.items():
        print(f"\n{name}: a first step, in units of the rate\n{ROW.format(*COLUMNS)}")
        found[name] = first_steps(make)
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("first_step", measure, None, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
