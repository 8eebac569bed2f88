"""PiSSA: start LoRA from W's largest singular vectors, and freeze the remainder of W."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.guards import in_precision_of, stored_weight, without_autocast
from lora.layer import LoRALinear


class PiSSALinear(LoRALinear):
    """`LoRALinear` on the remainder W - scaling * B0 A0, where A starts at A0 and B at B0 (Meng et
    al. 2024, https://arxiv.org/abs/2404.02948, equations 2 to 4).

    With W = U S V^T and root = sqrt(S[:r] / scaling), the start is B0 = U[:, :r] root (out, r) and
    A0 = root V[:, :r]^T (r, in). A resumed run recomputes B0 and A0 from W. A state dict contains
    W, B0 and A0, so that it does not depend on the base that it is loaded into.

    A new adapter changes nothing, up to rounding. In evaluation mode, the layer computes
    W x + b + scaling * (B A - B0 A0) x, like the base with the saved adapter. `base_layer` is
    copied, and stays unchanged. Raises ValueError for a rank outside 1 .. min(in, out) / 2: W has
    min(in, out) singular vectors, and the saved adapter has rank 2 r.
    """

    saved_as_plain = True
    original: Tensor  # W (out, in)
    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        limit = min(base_layer.in_features, base_layer.out_features) // 2
        if config.r > limit:
            raise ValueError(f"rank {config.r} is outside 1 .. {limit}: the saved rank is 2 r")
        weight = stored_weight(base_layer)
        super().__init__(deepcopy(base_layer).requires_grad_(False), config)
        with torch.no_grad(), without_autocast(weight):
            a, b = self.largest_part(weight)
            remainder = weight.float() - self.scaling * b @ a
            self.lora_A.weight.copy_(a)
            self.lora_B.weight.copy_(b)
            self.base_layer.weight.copy_(remainder.to(weight.dtype))
        for name, tensor in {"original": weight, "initial_A": a, "initial_B": b}.items():
            self.register_buffer(name, tensor.detach())

    def largest_part(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return A0 (r, in) and B0 (out, r) for W (out, in)."""
        r = self.config.r
        u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
        root = torch.diag(torch.sqrt(s[:r] / self.scaling))  # (r, r)
        return root @ vt[:r], u[:, :r] @ root

    def forward(self, input: Tensor) -> Tensor:
        if self.merged or (self.training and self.enabled):
            return super().forward(input)
        return self.as_saved(input)

    def as_saved(self, x: Tensor) -> Tensor:
        """Return the output of the base, plus the saved update if the adapter is enabled.

        Validation must measure the saved adapter, which is an update of W, not of the remainder. In
        low precision, the remainder is rounded, so remainder + scaling * B0 A0 differs from W.
        """
        y = F.linear(x, self.original.to(self.base_layer.weight.dtype), self.base_layer.bias)
        if not self.enabled:
            return y
        saved = self.saved_tensors()
        h = F.linear(in_precision_of(self.lora_A.weight, x), saved["lora_A.weight"])  # (..., 2 r)
        return (y + F.linear(h, saved["lora_B.weight"]) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def add_update(self) -> None:
        """Set W to the original W plus the saved update, as `as_saved` computes. The remainder may
        have been rounded, for example if the model was in bf16 before."""
        saved = self.saved_tensors()
        with without_autocast(self.original):
            update = saved["lora_B.weight"].float() @ saved["lora_A.weight"].float() * self.scaling
        self.base_layer.weight.copy_(self.original + update)

    @torch.no_grad()
    def remove_update(self) -> None:
        with without_autocast(self.original):
            initial = self.initial_B.float() @ self.initial_A.float() * self.scaling
        self.base_layer.weight.copy_(self.original - initial)

    def unwrapped(self) -> nn.Linear:
        """Return the wrapped linear layer. Raises ValueError unless the adapter is merged."""
        if not self.merged:
            raise ValueError("W lacks the initial update, scaling * B0 A0; merge the adapter first")
        return self.base_layer

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return [A; A0] and [B, -B0]. Their product B A - B0 A0 is an update of W, as in PEFT."""
        return {
            "lora_A.weight": torch.cat([self.lora_A.weight, self.initial_A]),
            "lora_B.weight": torch.cat([self.lora_B.weight, -self.initial_B], dim=1),
        }

    def saved_config(self) -> LoRAConfig:
        return self.config.stacked(2)
