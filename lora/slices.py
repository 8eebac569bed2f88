"""Adapt q, k or v alone in GPT-2's fused c_attn. Each slice has a separate A and B."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.layer import LoRALinear
from lora.targets import SLICES


class SlicedLoRALinear(LoRALinear):
    """y_i = W_i x + b_i + scaling * B_i A_i dropout(x) for each of n slices of width d = out / 3,
    as in the paper's experiments (Hu et al. 2021, 4.2) and in loralib's MergedLinear.

    Shapes: A_i (r, in), B_i (d, r). The layer equals plain LoRA of rank n * r with the same
    scaling, and is saved as such. The A of this LoRA stacks all A_i. B (3 d, n r) contains each B_i
    as a block, at the rows of slice i and at r columns that no other block uses. B is zero
    elsewhere.
    """

    saved_as_plain = True  # because PEFT has no slices

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig, slices: Collection[str]):
        super().__init__(base_layer, config.stacked(len(slices)))
        places = [i for i, name in enumerate(SLICES) if name in slices]
        width = base_layer.out_features // len(SLICES)
        blocks = _BlockSparseLinear(places, width, config.r).to(base_layer.weight.device)
        self.lora_B = blocks  # type: ignore[assignment]  # also has a weight and a forward


class _BlockSparseLinear(nn.Module):
    """A linear layer from n r to 3 d. The weight is zero except in n trained blocks (d, r)."""

    def __init__(self, places: list[int], width: int, r: int):
        super().__init__()
        self.places = places
        self.blocks = nn.Parameter(torch.zeros(len(places), width, r, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        n, d, r = self.blocks.shape
        whole = self.blocks.new_zeros(len(SLICES), d, n, r)
        for i, place in enumerate(self.places):  # indexing with a list would synchronise a GPU
            whole[place, :, i] = self.blocks[i]
        return whole.view(len(SLICES) * d, n * r)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight)
