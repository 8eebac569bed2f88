"""Stack several adapters of one layer into one adapter."""

import math

from lora.layer import LoRAConfig


def stacked(config: LoRAConfig, n: int) -> LoRAConfig:
    """Return the config of one adapter of rank n * r that stacks n adapters, with the same
    scaling.
    """
    alpha_factor = math.sqrt(n) if config.use_rslora else n
    return LoRAConfig(
        r=n * config.r,
        lora_alpha=alpha_factor * config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
    )
