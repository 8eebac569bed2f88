"""Fill in what was left open: precision, learning rate, the fields of an initial adapter."""

import math
from dataclasses import replace
from typing import Any

from adapters.quantisation import choose_quantisation
from common.device import Device
from common.errors import UserError, as_failure
from data.windows import Dataset
from lora.load import load_adapter_config
from lora.variants import config_fields
from storage.hf_compat import portable_name
from training.options import BEST, LORA_FIELDS, Options

RATES = (5e-4, 8e-3)  # the range of the best rates that were measured


def best_rate(steps: int, passes: float) -> float:
    """Return the peak learning rate, to two digits, of LoRA on all layers with alpha 16:
    0.035 / (steps * passes^2)^(1/3), within `RATES`.

    `passes` counts how often the run reads a token of its training part, on average. The rule was
    fitted to runs of 15 to 960 steps and 1.4 to 23 passes on `mini`. The rank hardly matters.
    """
    smallest, largest = RATES
    rate = 0.035 / (steps * passes**2) ** (1 / 3)
    return float(f"{min(max(rate, smallest), largest):.1e}")


def resolve(options: Options, base: str, device: Device, training: Dataset) -> Options:
    """Return the options with nothing left open. Raises UserError for LoRA-GA in fp16."""
    filled: dict[str, Any] = {"base": portable_name(base), "precision": device.precision}
    adapters = []
    if options.init_adapter:
        adapters.append(options.init_adapter)
        with as_failure():
            stored = config_fields(load_adapter_config(options.init_adapter))
        filled |= {name: stored[name] for name in LORA_FIELDS}
        filled["init_lora_weights"] = None  # A and B start as stored
    if options.method == "lora":
        filled["quantise"] = choose_quantisation(options.quantise, adapters)
    if options.init_lora_weights == "lora_ga" and device.precision == "fp16":
        raise UserError(
            "--init-lora-weights lora_ga: in fp16, small gradients vanish and large ones overflow; "
            "use --precision bf16 or fp32"
        )
    if options.lr is None:
        filled["lr"] = recipe_rate(options, training)
    resolved = replace(options, **filled)
    if options.recipe == BEST:
        print(describe_recipe(resolved))
    return resolved


def recipe_rate(options: Options, training: Dataset) -> float:
    """Return the best recipe's rate for this run's steps and passes."""
    _, steps = count_steps(options, len(training))
    windows = min(options.epochs * len(training), steps * options.batch_size)
    passes = training.passes_per_epoch * windows / len(training)
    return best_rate(steps, passes)


def count_steps(options: Options, windows: int) -> tuple[int, int]:
    """Return the number of steps of an epoch of this many windows, and of the run."""
    per_epoch = math.ceil(windows / options.batch_size)
    total = options.epochs * per_epoch
    if options.max_steps:
        total = min(total, options.max_steps)
    return per_epoch, total


def describe_recipe(options: Options) -> str:
    layers = options.target_modules
    names = layers if isinstance(layers, str) else " ".join(layers)
    return f"recipe best: lr {options.lr:g}, layers {names}, alpha {options.lora_alpha:g}"
