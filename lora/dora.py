"""DoRA: train a weight's direction by LoRA, and its magnitude by a vector of its own."""

import torch
from torch import Tensor, nn

from lora.layer import LoRAConfig, LoRALinear
from model import fast as ops


class DoRALinear(LoRALinear):
    """y = m / ||V|| * V x + b, with V = W + scaling * B A (Liu et al. 2024,
    https://arxiv.org/abs/2402.09353, equation 5).

    ||V|| (out,) holds the norm of each row of V. m = lora_magnitude_vector (out,) starts as ||W||
    and is trained, so a new adapter changes nothing. ||V|| counts as a constant in the gradients
    (4.3). As in PEFT, dropout also applies to the x that m / ||V|| - 1 scales:

    y = W x + b + (m / ||V|| - 1) W dropout(x) + m / ||V|| * scaling * B A dropout(x)
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__(base_layer, config)
        self.lora_magnitude_vector = nn.Parameter(
            torch.linalg.norm(base_layer.weight.detach().float(), dim=1)
        )
        self.register_buffer("norm", None, persistent=False)  # ||V|| of a merged layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., out)
        if self.merged or not self.enabled:
            return y
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if not torch.is_autocast_enabled(x.device.type):
            x, weight = x.to(self.lora_A.weight.dtype), weight.to(self.lora_A.weight.dtype)
        if self.training and self.lora_dropout.p > 0:
            x = self.lora_dropout(x)
            base = ops.linear(x, weight)  # W dropout(x)
        else:  # W x, which is known already
            base = y if bias is None else y - bias
        factor = self.lora_magnitude_vector / self._norm()  # (out,)
        update = (factor - 1) * base + factor * self.lora_B(self.lora_A(x)) * self.scaling
        return (y + update).to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return m / ||V|| * V - W, (out, in) in fp32; up to rounding if the layer is merged."""
        update = super().delta_weight()  # scaling * B A
        if not self.merged:
            self.norm = self._norm()  # kept for unmerging: the merged weight has another norm
        factor = (self.lora_magnitude_vector / self.norm)[:, None]  # (out, 1)
        weight = self.base_layer.weight.float()
        if self.merged:  # weight is factor * (W + update)
            weight = weight / factor - update
        return factor * (weight + update) - weight

    def adapter(self) -> dict[str, Tensor]:
        return super().adapter() | {"lora_magnitude_vector": self.lora_magnitude_vector}

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Return ||V||, (out,), in fp32."""
        with torch.autocast(self.base_layer.weight.device.type, enabled=False):
            return torch.linalg.norm(self.base_layer.weight.float() + super().delta_weight(), dim=1)
