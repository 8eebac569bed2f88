"""What an adapter is made of, in PEFT's words and PEFT's `adapter_config.json`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LoRAConfig:
    """Hyper-parameters of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("c_attn",)
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor of B A x: alpha / r (paper, 4.1), or alpha / sqrt(r) for rank-stabilised LoRA
        (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        """
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
