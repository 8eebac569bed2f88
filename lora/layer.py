"""The LoRA layer: a frozen linear layer plus a trained update of low rank."""

import math

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from model.ops import Dropout


class LoRALinear(nn.Module):
    """y = W x + b + scaling * B A dropout(x), with W and b frozen (paper, equation 3).

    Shapes: x (..., in), A = lora_A.weight (r, in), B = lora_B.weight (out, r), y (..., out).
    A starts as U(-1/sqrt(in), 1/sqrt(in)) and B as zero, so a new adapter changes nothing.
    A and B stay in fp32 whatever the base is in: their steps are small, and fp16 gradients could
    not be unscaled. Raises ValueError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        fan_in, fan_out = base_layer.in_features, base_layer.out_features
        if not 1 <= config.r <= min(fan_in, fan_out):
            raise ValueError(f"rank {config.r} is outside 1 .. {min(fan_in, fan_out)}")
        self.base_layer = base_layer
        self.scaling = config.scaling
        self.lora_dropout = Dropout(config.lora_dropout)
        # Drawn on the CPU in PEFT's order (A, B, then A again), so one seed gives one adapter.
        self.lora_A = nn.Linear(fan_in, config.r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, fan_out, bias=False, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.enabled, self.merged = True, False
        self.to(base_layer.weight.device)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., out)
        if self.merged or not self.enabled:
            return y
        if not torch.is_autocast_enabled(x.device.type):  # which casts for the products itself
            x = x.to(self.lora_A.weight.dtype)
        update = self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling  # (..., out)
        return (y + update).to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling * B A, (out, in), fp32: what merging adds to W."""
        return self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scaling

    def merge(self) -> None:
        """Fold the update into W, so that the layer costs what a plain one does."""
        if not self.merged:
            self._add_to_base(self.delta_weight())
            self.merged = True

    def unmerge(self) -> None:
        """Take the update out of W again, exact to rounding."""
        if self.merged:
            self._add_to_base(-self.delta_weight())
            self.merged = False

    @torch.no_grad()
    def _add_to_base(self, delta: Tensor) -> None:
        weight = self.base_layer.weight
        # In fp32 and cast once: in bf16 most of a small delta would round away.
        weight.copy_(weight.float() + delta)
