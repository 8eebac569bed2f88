"""PiSSA: start LoRA from W's largest singular vectors, and freeze the remainder of W."""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.layer import LoRAConfig, LoRALinear, stacked


@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    """LoRA's hyper-parameters, and the field by which PEFT knows PiSSA."""

    init_lora_weights: str = "pissa"


class PiSSALinear(LoRALinear):
    """`LoRALinear` on W - scaling * B0 A0, with A and B started at A0 and B0 (Meng et al. 2024,
    https://arxiv.org/abs/2404.02948, equations 2 to 4).

    With W = U S V^T: B0 = U[:, :r] sqrt(S[:r] / scaling) (out, r) and A0 = sqrt(S[:r] / scaling)
    V[:, :r]^T (r, in). A new adapter changes nothing, up to rounding. In evaluation mode the layer
    computes W x + b + scaling * (B A - B0 A0) x, as the saved adapter does. A resumed run computes
    A0, B0 and the remainder again from W; the given layer is copied, not changed. Raises ValueError
    for a rank outside 1 .. min(in, out) / 2: the saved adapter, which fits W, has twice the rank.
    """

    original: Tensor  # W (out, in), which the given layer and the saved adapter share
    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        limit = min(base_layer.weight.shape) // 2
        if config.r > limit:
            raise ValueError(f"rank {config.r} is outside 1 .. {limit}, which PiSSA can write")
        if not isinstance(base_layer.weight, nn.Parameter):
            raise ValueError("PiSSA changes W, which is quantised")
        super().__init__(deepcopy(base_layer).requires_grad_(False), config)
        self._take_out_of_w()
        buffers = {
            "original": base_layer.weight,
            "initial_A": self.lora_A.weight.clone(),
            "initial_B": self.lora_B.weight.clone(),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.detach(), persistent=False)

    @torch.no_grad()
    def _take_out_of_w(self) -> None:
        """Set A and B to A0 and B0, and W to the remainder."""
        r = self.config.r
        weight = self.base_layer.weight
        u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
        root = torch.diag(torch.sqrt(s[:r] / self.scaling))  # (r, r)
        self.lora_A.weight.data = root @ vt[:r]
        self.lora_B.weight.data = u[:, :r] @ root
        start = self.scaling * self.lora_B.weight @ self.lora_A.weight
        weight.data = (weight.float() - start).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or (self.training and self.enabled):
            return super().forward(x)
        return self.as_saved(x)

    def as_saved(self, x: Tensor) -> Tensor:
        """Return what the base computes and, unless disabled, the saved adapter on it.

        In low precision the remainder is rounded, so that remainder + B0 A0 is not quite W. A
        validation must measure what is saved.
        """
        y = F.linear(x, self.original.to(self.base_layer.weight.dtype), self.base_layer.bias)
        if not self.enabled:
            return y
        saved = self.saved_tensors()
        h = F.linear(self.in_adapter_precision(x), saved["lora_A.weight"])  # (..., 2 r)
        return (y + F.linear(h, saved["lora_B.weight"]) * self.scaling).to(y.dtype)

    def unwrapped(self) -> nn.Linear:
        """Return the linear layer inside. Raises ValueError unless the adapter is merged."""
        if not self.merged:
            raise ValueError("PiSSA took the largest part of W out; merge it first")
        return self.base_layer

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return B A - B0 A0 = [B, -B0] [A; A0], an adapter of W itself, as PEFT converts it."""
        return {
            "lora_A.weight": torch.cat([self.lora_A.weight, self.initial_A]),
            "lora_B.weight": torch.cat([self.lora_B.weight, -self.initial_B], dim=1),
        }

    def saved_config(self) -> LoRAConfig:
        return stacked(self.config, 2)
