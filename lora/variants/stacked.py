"""Stack several adapters of one layer into one adapter."""

import math

from lora.layer import LoRAConfig


def stacked(config: LoRAConfig, n: int) -> LoRAConfig:
    """Return the config of one adapter that stacks n adapters with this config. Its rank is n * r,
    and its scaling is the scaling of this config.
    """
    alpha_factor = math.sqrt(n) if config.use_rslora else n
    return LoRAConfig(
        r=n * config.r,
        lora_alpha=alpha_factor * config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
    )
