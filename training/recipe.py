"""Fill in missing options: precision, learning rate, and LoRA options from an initial adapter."""

import math
import re
from dataclasses import replace
from typing import Any

from adapters.quantisation import choose_quantisation
from common.device import Device
from common.errors import as_failure
from data.windows import Dataset
from lora.load import load_adapter_config
from storage.hf_compat import portable_name
from training.options import BEST, LORA_FIELDS, Options, Settings, adapter_config

RATES = (5e-4, 8e-3)  # about the smallest and the largest of the measured best learning rates
# The best rate of a variant, divided by plain LoRA's best rate, at rank 8 (docs/experiments.md)
PISSA = 1 / 4
LAYERS = (".attn.c_attn", ".attn.c_proj", ".mlp.c_fc", ".mlp.c_proj")
# The best rate if one layer of a block is adapted, divided by the best rate for all four layers
# (docs/experiments.md)
ONE_LAYER = 2.0


def rule(steps: float, passes: float) -> float:
    """Return the best peak learning rate for plain LoRA on all layers with alpha 16, at any rank.

    `passes` is how often, on average, the run reads a token of the training part. The rule was
    fitted to runs of the model `mini` with 15 to 960 steps and 1.4 to 23 passes
    (docs/experiments.md).
    """
    return 0.035 / (steps * passes**2) ** (1 / 3)


def best_rate(steps: int, passes: float) -> float:
    """Return the rate of `rule`, limited to `RATES` and rounded to two digits."""
    smallest, largest = RATES
    return two_digits(min(max(rule(steps, passes), smallest), largest))


def rate_factor(options: Options) -> float:
    """Return the best rate of this adapter, divided by the best rate of plain LoRA on all layers
    with alpha 16.

    With s = alpha / r, or alpha / sqrt(r) for rsLoRA, the update is s B A. At s * r = 16, the best
    rate is nearly the same for every rank. As s * r grows from 2 to 128, the best rate falls about
    as (s * r)^(-2/3). With LoRA+ at ratio 16, the best rate of A is 8 times lower, so the function
    takes ratio^(3/4) as the divisor (16^(3/4) = 8). Between the measured values
    (docs/experiments.md), it interpolates with these two power laws, in s * r and in the ratio.
    """
    config = adapter_config(options)
    factor = (16 / (config.scaling * config.r)) ** (2 / 3)
    factor *= (options.loraplus_lr_ratio or 1) ** (-3 / 4)
    if options.init_lora_weights == "pissa":
        factor *= PISSA
    if adapts_one_layer(options.target_modules):
        factor *= ONE_LAYER
    return min(factor, 2)  # no larger factor was measured


def adapts_one_layer(targets: tuple[str, ...] | str) -> bool:
    """Return whether the targets name only one layer of a block, or slices of that layer. For
    `c_proj` the answer is False, because it names two layers.
    """
    if isinstance(targets, str):  # all-linear
        return False
    named = set()
    for target in targets:
        name = re.sub(r"\.[qkv]$", "", f".{target}")  # without the slice
        named |= {layer for layer in LAYERS if name.endswith(layer) or layer.endswith(name)}
    return len(named) == 1


def fill_in(options: Options, base: str, device: Device) -> Options:
    """Return the options with all values filled in, except a learning rate that depends on the
    text. The values come from the base, the device and `--init-adapter`.
    """
    filled: dict[str, Any] = {"base": portable_name(base), "precision": device.precision}
    adapters = []
    if options.init_adapter:
        adapters.append(options.init_adapter)
        with as_failure():
            stored = load_adapter_config(options.init_adapter)
        filled |= {name: getattr(stored, name) for name in LORA_FIELDS}
    if options.method == "lora":
        filled["quantise"] = choose_quantisation(options.quantise, adapters)
    return replace(options, **filled)


def with_rate(options: Options, training: Dataset) -> Settings:
    """Return the options with the learning rate filled in, by the rule of the recipe."""
    rate = options.lr
    if rate is None:
        rate = two_digits(recipe_rate(options, training) * rate_factor(options))
    settings = Settings(**vars(options) | {"lr": rate})
    if options.recipe == BEST:
        print(describe_recipe(settings))
    return settings


def recipe_rate(options: Options, training: Dataset) -> float:
    """Return the best rate of plain LoRA for the steps and passes of this run."""
    _, steps = count_steps(options, len(training))
    windows = min(options.epochs * len(training), steps * options.batch_size)
    passes = training.passes_per_epoch * windows / len(training)
    return best_rate(steps, passes)


def count_steps(options: Options, windows: int) -> tuple[int, int]:
    """Return the number of steps per epoch and in the whole run. An epoch has `windows` windows."""
    per_epoch = math.ceil(windows / options.batch_size)
    total = options.epochs * per_epoch
    if options.max_steps:
        total = min(total, options.max_steps)
    return per_epoch, total


def describe_recipe(options: Settings) -> str:
    layers = options.target_modules
    names = layers if isinstance(layers, str) else " ".join(layers)
    return (
        f"recipe best: lr {options.lr:g}, layers {names}, alpha {options.lora_alpha:g}, "
        f"batch {options.batch_size}; also try half and twice this lr"
    )


def two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")
