"""The LoRA layer: a frozen linear layer plus a trained low-rank update."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from model.fast import Dropout


@dataclass(frozen=True)
class LoRAConfig:
    """Hyper-parameters of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685), named as in
    PEFT's `adapter_config.json`.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ("c_attn",)  # `find_targets` says what names match
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | None = None  # only these blocks; None: all
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regex -> r of matching layers
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # regex -> their lora_alpha
    use_dora: bool = False
    init_lora_weights: bool | str = True  # A uniform and B zero; or "pissa"

    @property
    def scaling(self) -> float:
        """Return the factor of B A x: alpha / r (paper, 4.1), or alpha / sqrt(r) for rsLoRA
        (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        """
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def stacked(self, n: int) -> "LoRAConfig":
        """Return the config of rank n * r with the same scaling: n adapters' A and B stacked."""
        alpha = self.lora_alpha * (math.sqrt(n) if self.use_rslora else n)
        return replace(self, r=n * self.r, lora_alpha=alpha)


class LoRALinear(nn.Module):
    """y = W x + b + scaling * B A dropout(x) (paper, equation 3); `inject` freezes W and b.

    Shapes: x (..., in), A = lora_A.weight (r, in), B = lora_B.weight (out, r), y (..., out).
    A starts as U(-1/sqrt(in), 1/sqrt(in)) and B as zero, so a new adapter changes nothing.
    Trained A and B are fp32 whatever the base's precision: their steps are small, and GradScaler
    refuses fp16 gradients. Raises ValueError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        fan_in, fan_out = base_layer.in_features, base_layer.out_features
        if not 1 <= config.r <= min(fan_in, fan_out):
            raise ValueError(f"rank {config.r} is outside 1 .. {min(fan_in, fan_out)}")
        self.base_layer, self.config = base_layer, config  # `save_adapter` writes this config
        self.scaling = config.scaling
        self.lora_dropout = Dropout(config.lora_dropout)
        # Drawn on the CPU in PEFT's order (A, B, A again), so a seed gives PEFT's A on any device.
        # With a = sqrt(5) Kaiming's bound, sqrt(6 / (1 + a^2) / in), is 1 / sqrt(in).
        self.lora_A = nn.Linear(fan_in, config.r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, fan_out, bias=False, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.enabled, self.merged = True, False
        self.register_state_dict_pre_hook(_refuse_merged)
        self.register_load_state_dict_pre_hook(_refuse_merged)
        self.to(base_layer.weight.device).train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., out)
        if self.merged or not self.enabled:  # merged: W holds the update already
            return y
        if not torch.is_autocast_enabled(x.device.type):  # it would cast x for each matmul
            x = x.to(self.lora_A.weight.dtype)
        update = self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling  # (..., out)
        return (y + update).to(y.dtype)

    def adapter(self) -> dict[str, Tensor]:
        """Return this layer's tensors in an adapter file, under PEFT's names."""
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return scaling * B A, (out, in) in fp32: what merging adds to W."""
        return self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scaling


def _refuse_merged(layer: LoRALinear, *_) -> None:
    if layer.merged:  # the update would be added twice, or subtracted from a W without it
        raise ValueError("the adapter is merged; unmerge it before taking or loading a state dict")
