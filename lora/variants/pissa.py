"""PiSSA: start LoRA from W's largest singular vectors, and freeze the remainder of W."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora.layer import LoRAConfig
from lora.variants.offset import OffsetLinear


@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    """LoRA's hyper-parameters, and PEFT's field for PiSSA."""

    init_lora_weights: str = "pissa"


class PiSSALinear(OffsetLinear):
    """An `OffsetLinear` whose A and B start from W's largest singular vectors (Meng et al. 2024,
    https://arxiv.org/abs/2404.02948, equations 2 to 4).

    With W = U S V^T and root = sqrt(S[:r] / scaling), the start is B0 = U[:, :r] root (out, r) and
    A0 = root V[:, :r]^T (r, in). A resumed run recomputes B0 and A0 from W.
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__(base_layer, config)
        self.start_at(*self.largest_part())

    @torch.no_grad()
    def largest_part(self) -> tuple[Tensor, Tensor]:
        """Return A0 (r, in) and B0 (out, r)."""
        r = self.config.r
        u, s, vt = torch.linalg.svd(self.original.float(), full_matrices=False)
        root = torch.diag(torch.sqrt(s[:r] / self.scaling))  # (r, r)
        return root @ vt[:r], u[:, :r] @ root
