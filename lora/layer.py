"""The LoRA layer: a frozen linear layer plus a trained low-rank update.

To use the layer elsewhere, copy this file, `lora/config.py` and `lora/guards.py`, and wrap a frozen
`nn.Linear` in `LoRALinear`. They need only PyTorch.
"""

import math

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.guards import (
    check_adaptable,
    check_mergeable,
    describe_weight,
    in_precision_of,
    refuse_merged,
    weighted_sum,
    without_autocast,
)


class LoRALinear(nn.Module):
    """y = W x + b + s B A dropout(x) with s = `config.scaling` (Hu et al. 2021, equation 3,
    https://arxiv.org/abs/2106.09685). `inject` freezes W and b.

    Shapes: x (..., in), A = lora_A.weight (r, in), B = lora_B.weight (out, r), y (..., out).
    A starts as U(-1/sqrt(in), 1/sqrt(in)) and B as zero, so a new adapter changes nothing.
    A and B are trained in fp32 even if the base is in lower precision, because updates are small
    and GradScaler refuses fp16 gradients. Raises ValueError as `check_adaptable` does.
    """

    saved_as_plain = False  # whether an adapter's file contains an equal plain LoRA in its place

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        device = check_adaptable(base_layer)
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        self.base_layer = base_layer
        self.config = config
        self.scaling = config.scaling
        self.enabled = True
        self.merged = False
        self.merged_sums: list[float] = []  # see `sums`
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        # The random numbers of A and B are drawn on the CPU, in PEFT's order: `nn.Linear` draws A,
        # then B, and Kaiming's initialisation draws A again. So a seed gives the same A as in PEFT,
        # on any device.
        self.lora_A = nn.Linear(self.in_features, config.r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, self.out_features, bias=False, dtype=torch.float32)
        # With a = sqrt(5), Kaiming's bound sqrt(6 / (1 + a^2) / in) is 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_state_dict_pre_hook(refuse_merged)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(refuse_merged)  # type: ignore[no-untyped-call]
        self.to(device)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """Describe W for models such as T5, which reads its dtype. A computation with W would lack
        the update, so it raises ValueError."""
        return describe_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        """Return b, which the adapter does not change."""
        return self.base_layer.bias

    def forward(self, input: Tensor) -> Tensor:  # the argument's name in nn.Linear
        y: Tensor = self.base_layer(input)  # (..., out)
        if self.merged or not self.enabled:  # a merged W contains the update
            return y
        update = self.update(in_precision_of(self.lora_A.weight, input), y)
        return (y + update).to(y.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Return scaling * B A dropout(x), (..., out). `forward` adds this term to y = W x + b.

        The r numbers of A x are scaled, because they are fewer than B's. Only DoRA reads y.
        """
        update: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x)) * self.scaling)
        return update

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the update scaling * B A (out, in) in fp32. Merging adds this update to W."""
        with without_autocast(self.lora_A.weight):
            return self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scaling

    def merge(self) -> None:
        """Set W to W + scaling * B A. The layer then runs as fast as a plain linear layer.

        Does nothing if the layer is already merged. Raises ValueError as `check_mergeable` does.
        """
        if not self.merged:
            self.check_mergeable()
            self.add_update()
            self.merged = True
            self.merged_sums = self.sums()

    def unmerge(self) -> None:
        """Undo `merge`, up to rounding. Raises ValueError as `check_unmergeable` does."""
        if self.merged:
            self.check_unmergeable()
            self.remove_update()
            self.merged = False

    def add_update(self) -> None:
        self.base_layer.weight.data += self.delta_weight()

    def remove_update(self) -> None:
        self.base_layer.weight.data -= self.delta_weight()

    def check_mergeable(self) -> None:
        """Raise ValueError if the adapter is disabled, or as the guard does."""
        if not self.enabled:
            raise ValueError("the adapter is disabled; enable it before merging")
        check_mergeable(self.base_layer)

    def check_unmergeable(self) -> None:
        """Raise ValueError if A or B has changed since the merge, for example in an average of
        merged models. W would keep the difference."""
        if self.merged and not all(map(math.isclose, self.merged_sums, self.sums())):
            raise ValueError("A or B has changed since the merge; load the base again")

    def sums(self) -> list[float]:
        """Return a weighted sum of A, of B, and of DoRA's magnitudes, which shows a change."""
        named = self.named_parameters()
        return [weighted_sum(p) for name, p in named if not name.startswith("base_layer.")]

    def unwrapped(self) -> nn.Linear:
        """Return the wrapped linear layer. After `merge`, W includes the update."""
        return self.base_layer

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the tensors for an adapter file, under PEFT's names."""
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def saved_config(self) -> LoRAConfig:
        """Return the config that fits `saved_tensors`."""
        return self.config
