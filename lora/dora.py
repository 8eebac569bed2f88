"""DoRA: the weight's direction by LoRA, its magnitude by a vector of its own."""

import torch
from torch import Tensor, nn

from lora.layer import LoRAConfig, LoRALinear
from model import fast as ops


class DoRALinear(LoRALinear):
    """y = m / ||V|| * V x + b, with V = W + scaling * B A (Liu et al. 2024,
    https://arxiv.org/abs/2402.09353, equation 5).

    ||V|| (out,) holds the norm of each row of V, and m = lora_magnitude_vector (out,) is trained
    from ||W|| on, so a new adapter changes nothing. Gradients take ||V|| for a constant (4.3). As
    in PEFT, what m / ||V|| - 1 scales goes through dropout as well:

    y = W x + b + (m / ||V|| - 1) W dropout(x) + m / ||V|| * scaling * B A dropout(x)
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__(base_layer, config)
        self.lora_magnitude_vector = nn.Parameter(
            torch.linalg.norm(base_layer.weight.detach().float(), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., out)
        if self.merged or not self.enabled:
            return y
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if not torch.is_autocast_enabled(x.device.type):
            x, weight = (t.to(self.lora_A.weight.dtype) for t in (x, weight))
        if self.training and self.lora_dropout.p > 0:
            x = self.lora_dropout(x)
            base = ops.linear(x, weight)
        else:  # W x is known already
            base = y if bias is None else y - bias
        factor = self.lora_magnitude_vector / self._norm()  # (out,)
        update = (factor - 1) * base + factor * self.lora_B(self.lora_A(x)) * self.scaling
        return (y + update).to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return m / ||V|| * V - W, (out, in) in fp32; of a merged layer too, to rounding."""
        delta = super().delta_weight()
        if not self.merged:
            self.norm = self._norm()  # merging makes it another, and unmerging needs it
        factor = (self.lora_magnitude_vector / self.norm)[:, None]
        weight = self.base_layer.weight.float()
        if self.merged:
            weight = weight / factor - delta
        return factor * (weight + delta) - weight

    def adapter(self) -> dict[str, Tensor]:
        return super().adapter() | {"lora_magnitude_vector": self.lora_magnitude_vector}

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Return ||V||, (out,), in fp32."""
        with torch.autocast(self.base_layer.weight.device.type, enabled=False):
            return torch.linalg.norm(self.base_layer.weight.float() + super().delta_weight(), dim=1)
