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
    V[:, :r]^T (r, in). A new adapter changes nothing, up to rounding. A resumed run computes A0, B0
    and the remainder again from W; the given layer is copied, not changed. Raises ValueError for a
    rank outside 1 .. min(in, out) / 2: the saved adapter, which fits W, has twice the rank.
    """

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
        self.register_buffer("initial_A", self.lora_A.weight.detach().clone(), persistent=False)
        self.register_buffer("initial_B", self.lora_B.weight.detach().clone(), persistent=False)

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
        y = super().forward(x)
        if self.enabled:
            return y
        start = F.linear(F.linear(x.to(self.initial_A.dtype), self.initial_A), self.initial_B)
        return (y + start * self.scaling).to(y.dtype)  # W x + b, up to rounding

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
