"""The LoRA layer: a frozen linear layer plus a trained low-rank update.

This file needs only PyTorch and `lora/config.py`. Copy both files to any project, and wrap a frozen
`nn.Linear` in `LoRALinear`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig


class DescriptionOfWeight(Tensor):
    """A part of W for code that reads `weight.dtype` or `weight.device`. Raises ValueError if the
    code computes with it, because the result would lack the update."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":  # not an attribute
            raise ValueError(
                "the model computes with `weight` of a LoRA layer, which lacks the update; call "
                "the layer, or leave it out of target_modules (the base's W: base_layer.weight)"
            )
        return super().__torch_function__(  # type: ignore[no-untyped-call]
            func, types, args, kwargs
        )


class LoRALinear(nn.Module):
    """y = W x + b + s B A dropout(x) with s = `config.scaling` (Hu et al. 2021, equation 3,
    https://arxiv.org/abs/2106.09685). `inject` freezes W and b.

    Shapes: x (..., in), A = lora_A.weight (r, in), B = lora_B.weight (out, r), y (..., out).
    A starts as U(-1/sqrt(in), 1/sqrt(in)) and B as zero, so a new adapter changes nothing.
    A and B are trained in fp32 even if the base is in lower precision, because updates are small
    and GradScaler refuses fp16 gradients. Raises ValueError for a rank outside 1 .. min(in, out).
    """

    saved_as_plain = False  # whether an adapter's file contains an equal plain LoRA in its place

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        fan_in = base_layer.in_features
        fan_out = base_layer.out_features
        if config.r > min(fan_in, fan_out):
            raise ValueError(
                f"rank {config.r} is outside 1 .. {min(fan_in, fan_out)}; "
                "lower r, or leave out the layer"
            )

        self.in_features = fan_in
        self.out_features = fan_out
        self.base_layer = base_layer
        self.config = config
        self.scaling = config.scaling
        self.enabled = True
        self.merged = False
        self.merged_values: list[Tensor] = []  # of A and B, for `unmerge`
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        # The random numbers of A and B are drawn on the CPU, in PEFT's order: `nn.Linear` draws A,
        # then B, and Kaiming's initialisation draws A again. So a seed gives the same A as in PEFT,
        # on any device.
        self.lora_A = nn.Linear(fan_in, config.r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, fan_out, bias=False, dtype=torch.float32)
        # With a = sqrt(5), Kaiming's bound sqrt(6 / (1 + a^2) / in) is 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_merged)  # type: ignore[no-untyped-call]
        if self.weight.dtype.is_complex:
            raise ValueError("the weight is complex, but A and B are real; leave out the layer")
        self.to(self.weight.device)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """Describe W for models such as T5, which read its dtype, and Mamba, which reads its
        device. The tensor has no rows, (0, in), and refuses computations.

        A quantised layer stores `no_rows`, because reading its `weight` would decode W.
        """
        no_rows = getattr(self.base_layer, "no_rows", None)
        rows = self.base_layer.weight[:0] if no_rows is None else no_rows
        return rows.as_subclass(DescriptionOfWeight)

    @property
    def bias(self) -> Tensor | None:
        """Return b, which the adapter does not change. Models such as Mamba read b."""
        return self.base_layer.bias

    def forward(self, input: Tensor) -> Tensor:  # the argument's name in nn.Linear
        y: Tensor = self.base_layer(input)  # (..., out)
        if self.merged or not self.enabled:  # a merged W contains the update
            return y
        update = self.update(self.in_adapter_precision(input), y)
        return (y + update).to(y.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Return scaling * B A dropout(x), (..., out). `forward` adds this term to y = W x + b.

        Only DoRA reads y.
        """
        update: Tensor
        small = self.lora_A(self.lora_dropout(x))  # (..., r)
        if math.frexp(self.scaling)[0] == 0.5:  # a power of two: no rounding
            update = self.lora_B(small * self.scaling)
        else:
            update = self.lora_B(small) * self.scaling
        return update

    def in_adapter_precision(self, x: Tensor) -> Tensor:
        """Return x in the precision of A and B. Under autocast, leave the cast to each matmul. But
        autocast does not cast fp64."""
        may_be_cast = not x.is_meta and x.dtype != torch.float64
        if may_be_cast and torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.lora_A.weight.dtype)

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
            self.merged_values = self.adapter_values()

    def add_update(self) -> None:
        self.base_layer.weight.data += self.delta_weight()

    def remove_update(self) -> None:
        self.base_layer.weight.data -= self.delta_weight()

    def check_mergeable(self) -> None:
        """Raise ValueError if the adapter is disabled, or if W is not stored in fp32 or fp64, or is
        on the meta device.

        In bf16, adding a small update to W would round the update away.
        """
        if not self.enabled:
            raise ValueError("the adapter is disabled; enable it before merging")
        weight = stored_weight(self.base_layer)
        if weight.is_meta:  # torch would ignore a change
            raise ValueError(
                "the weight is on the meta device, or offloaded by accelerate; load it"
            )
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the weight is in {weight.dtype}, and merging into it would round part of the "
                "update away; convert the model to fp32 before merging"
            )

    def unmerge(self) -> None:
        """Undo `merge`, up to rounding. Raises ValueError as `check_unmergeable` does."""
        if self.merged:
            self.check_unmergeable()
            self.remove_update()
            self.merged = False

    def adapter_values(self) -> list[Tensor]:
        """Return copies of A and B, and of DoRA's magnitudes."""
        named = self.named_parameters()
        return [p.detach().clone() for name, p in named if not name.startswith("base_layer.")]

    def check_unmergeable(self) -> None:
        """Raise ValueError if A or B has changed since the merge, for example in an average of
        merged models. W would keep the difference."""
        pairs = zip(self.merged_values, self.adapter_values(), strict=True)
        if self.merged and not all(torch.equal(old.to(new), new) for old, new in pairs):
            raise ValueError("A or B has changed since the merge; load the base again")

    def unwrapped(self) -> nn.Linear:
        """Return the wrapped linear layer. After `merge`, W includes the update."""
        return self.base_layer

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the tensors for an adapter file, under PEFT's names."""
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def saved_config(self) -> LoRAConfig:
        """Return the config that fits `saved_tensors`."""
        return self.config


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Return a context for products of weights, which autocast around the caller would round."""
    device = tensor.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def check_linear(layer: nn.Linear) -> None:
    """Raise ValueError unless the layer's forward is W x + b, with `weight` as W.

    A subclass of `nn.Linear` may override `forward` and still compute W x + b. Such a subclass sets
    the class attribute `computes_linear = True`. The package accelerate replaces the `forward` of a
    layer object, in order to move x to the layer's device, and sets `_hf_hook`.
    """
    refuse_hooks(layer)
    kind = type(layer)
    in_class = kind.forward is not nn.Linear.forward and not getattr(kind, "computes_linear", False)
    in_object = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
    if in_class or in_object:
        raise ValueError(
            f"{kind.__name__} overrides forward, which may compute something other than W x + b; "
            "use plain LoRA, and do not merge"
        )


def refuse_hooks(layer: nn.Module) -> None:
    """Raise ValueError if the layer has forward hooks, which may change x or the output, and which
    would be lost with the layer."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError(
            f"{type(layer).__name__} has a forward hook, which may change x or the output; "
            "remove the hook, or use plain LoRA, and do not merge"
        )


def stored_weight(layer: nn.Linear) -> nn.Parameter:
    """Return W, for in-place changes. Raises ValueError unless the layer computes W x + b, and
    stores W as a parameter.
    """
    check_linear(layer)
    if not isinstance(layer.weight, nn.Parameter):
        raise ValueError(
            "the weight is computed from other tensors, so a change to the weight would be lost; "
            "`dequantise` the model, or remove a parametrization (weight_norm) before `inject`"
        )
    return layer.weight


def _refuse_merged(layer: LoRALinear, *_: object) -> None:
    # A merged layer's state dict would contain the update twice, in W and as A and B. Loading a
    # state dict into a merged layer would set W to a weight without the update, and `unmerge` would
    # then subtract the update from this weight.
    if layer.merged:
        raise ValueError("the adapter is merged; unmerge it before taking or loading a state dict")
