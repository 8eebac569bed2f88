"""DoRA: train the direction of W by LoRA, and the magnitude of W as a vector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.guards import check_linear, in_precision_of, without_autocast
from lora.layer import LoRALinear


class DoRALinear(LoRALinear):
    """y = m / ||V|| * V x + b, with V = W + scaling * B A (Liu et al. 2024,
    https://arxiv.org/abs/2402.09353, equation 5).

    ||V|| (out,) is the norm of each row of V. The trained m = lora_magnitude_vector (out,) starts
    as ||W||, so a new adapter changes nothing. Gradients treat ||V|| as a constant (paper, 4.3).
    As in PEFT, dropout applies to x in both terms of the update:

    y = W x + b + (m / ||V|| - 1) W dropout(x) + m / ||V|| * scaling * B A dropout(x)

    Raises ValueError if ||W|| of a row is 0, infinite or NaN in fp32.
    """

    merged_norm: Tensor  # ||V|| of a merged layer

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        check_linear(base_layer)  # the norm is computed from `weight`
        super().__init__(base_layer, config)
        norms = torch.linalg.norm(base_layer.weight.detach().float(), dim=1)
        if not norms.is_meta:
            _check_norms(norms)
        self.lora_magnitude_vector = nn.Parameter(norms)
        self.register_buffer("merged_norm", None, persistent=False)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the last two terms of the equation in the class's docstring, (..., out)."""
        weight = self.base_layer.weight  # read once, because a quantised layer decodes it
        if self.training and self.lora_dropout.p > 0:
            x = self.lora_dropout(x)
            base = F.linear(x, in_precision_of(self.lora_A.weight, weight))  # W dropout(x)
        elif self.base_layer.bias is not None:
            base = y - self.base_layer.bias  # W x, because y = W x + b
        else:
            base = y
        factor = self.lora_magnitude_vector / self.norm(weight)  # (out,)
        change = (factor - 1).to(base.dtype) * base
        low_rank: Tensor = self.lora_B(self.lora_A(x))
        return change + factor.to(low_rank.dtype) * low_rank * self.scaling

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """Return ||V||, (out,), in fp32. `weight` is W."""
        with without_autocast(self.lora_A.weight):
            norms: Tensor = torch.linalg.norm(weight.float() + super().delta_weight(), dim=1)
        return norms

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return m / ||V|| * V - W, (out, in) in fp32. In a merged layer, the original W is
        recomputed, up to rounding.
        """
        update = super().delta_weight()  # scaling * B A
        weight = self.base_layer.weight.float()
        if self.merged:  # weight is factor * (W + update)
            factor = (self.lora_magnitude_vector / self.merged_norm)[:, None]  # (out, 1)
            weight = weight / factor - update
        else:
            factor = (self.lora_magnitude_vector / self.norm(weight))[:, None]
        return factor * (weight + update) - weight

    @torch.no_grad()
    def add_update(self) -> None:
        """Set W to m / ||V|| * V. To add `delta_weight` to W would round a small row as W is."""
        weight = self.base_layer.weight
        self.merged_norm = self.norm(weight)  # for `unmerge`, because merging changes the norm
        factor = (self.lora_magnitude_vector / self.merged_norm)[:, None]  # (out, 1)
        weight.copy_(factor * (weight + super().delta_weight()))

    @torch.no_grad()
    def remove_update(self) -> None:
        factor = (self.lora_magnitude_vector / self.merged_norm)[:, None]  # (out, 1)
        if not factor.all():
            raise ValueError("a magnitude is 0, so the merge cannot be undone; load the base again")
        weight = self.base_layer.weight
        weight.copy_(weight / factor - super().delta_weight())

    def saved_tensors(self) -> dict[str, Tensor]:
        return super().saved_tensors() | {"lora_magnitude_vector": self.lora_magnitude_vector}


def _check_norms(norms: Tensor) -> None:
    """Raise ValueError, naming the first such row, for a norm that gives NaN in m / ||V||."""
    wrong = (~((norms > 0) & norms.isfinite())).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"row {row} of the weight has the norm {norms[row]:g} in fp32, by which DoRA cannot "
            "divide; leave out the layer"
        )
