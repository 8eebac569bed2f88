"""The LoRA layer: a frozen linear layer plus a trained low-rank update.

This file needs only PyTorch. Copy the file to any project, and wrap a frozen `nn.Linear` in
`LoRALinear`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

RANKS = (1, 1 << 20)  # minimum and maximum
ALPHAS = (0, 3e6)


@dataclass(frozen=True)
class LoRAConfig:
    """Hyper-parameters of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    The fields are named as in PEFT's `adapter_config.json`. As in PEFT, a field that is a tuple
    here may be given as a list, and the two `layers_` fields may be given as a single value. Raises
    ValueError, naming the field, for a value that is not possible, and for fields that exclude each
    other.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ("c_attn",)  # see `find_targets`
    use_rslora: bool = False  # see `scaling`
    use_dora: bool = False  # see `DoRALinear`
    init_lora_weights: bool | str = True  # "pissa": see `PiSSALinear`
    layers_to_transform: tuple[int, ...] | None = None  # only these blocks (None: all)
    layers_pattern: tuple[str, ...] | None = None  # name of the list of blocks, such as "h"
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regex of layers -> r
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # regex of layers -> lora_alpha

    def __post_init__(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", _as_tuple(self.target_modules))
        _check_config(self)

    @property
    def scaling(self) -> float:
        """Return the factor that scales B A x. The factor is alpha / r (paper, 4.1), or
        alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        """
        if self.use_rslora:
            return self.lora_alpha / math.sqrt(self.r)
        return self.lora_alpha / self.r

    def stacked(self, n: int) -> "LoRAConfig":
        """Return the config of one plain adapter that stacks n adapters with this config. Its rank
        is n * r, and its scaling is the scaling of this config.
        """
        alpha_factor = math.sqrt(n) if self.use_rslora else n
        return replace(
            self,
            r=n * self.r,
            lora_alpha=alpha_factor * self.lora_alpha,
            init_lora_weights=True,
        )


class LoRALinear(nn.Module):
    """y = W x + b + s B A dropout(x) with s = `scaling` (paper, equation 3). `inject` freezes W
    and b.

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

        self.base_layer = base_layer
        self.config = config
        self.scaling = config.scaling
        self.enabled = True
        self.merged = False
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        # The random numbers of A and B are drawn on the CPU, in PEFT's order: `nn.Linear` draws A,
        # then B, and Kaiming's initialisation draws A again. So a seed gives the same A as in PEFT,
        # on any device.
        self.lora_A = nn.Linear(fan_in, config.r, bias=False, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, fan_out, bias=False, dtype=torch.float32)
        # With a = sqrt(5), Kaiming's bound sqrt(6 / (1 + a^2) / in) is 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_state_dict_pre_hook(_refuse_merged)
        self.register_load_state_dict_pre_hook(_refuse_merged)
        self.to(base_layer.weight.device)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """Return an empty slice of W, (0, in), for models such as T5 that read the dtype or device.

        If this property returned all of W, a model could multiply by W without calling `forward`,
        and silently lose the update. A product with the empty slice has no columns, so the model
        fails instead. A quantised layer stores the empty slice, because to read `weight` decodes W.
        """
        no_rows = getattr(self.base_layer, "no_rows", None)
        return self.base_layer.weight[:0] if no_rows is None else no_rows

    @property
    def bias(self) -> Tensor | None:
        """Return b, which the adapter does not change. Models such as Mamba read b."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., out)
        if self.merged or not self.enabled:  # a merged W contains the update
            return y
        update = self.update(self.in_adapter_precision(x), y)
        return (y + update).to(y.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Return scaling * B A dropout(x), (..., out). `forward` adds this term to y = W x + b.

        Only DoRA reads y.
        """
        small = self.lora_A(self.lora_dropout(x))  # (..., r)
        if math.frexp(self.scaling)[0] == 0.5:  # a power of two: no rounding
            return self.lora_B(small * self.scaling)
        return self.lora_B(small) * self.scaling

    def in_adapter_precision(self, x: Tensor) -> Tensor:
        """Return x in the precision of A and B. Under autocast, leave the cast to each matmul."""
        if torch.is_autocast_enabled(x.device.type):
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
            self.base_layer.weight.data += self.delta_weight()
            self.merged = True

    def check_mergeable(self) -> None:
        """Raise ValueError if the adapter is disabled, or if W is not stored in fp32 or fp64.

        In bf16, adding a small update to W would round the update away.
        """
        if not self.enabled:
            raise ValueError("the adapter is disabled; enable it before merging")
        weight = stored_weight(self.base_layer)
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the weight is in {weight.dtype}, and merging into it would round part of the "
                "update away; convert the model to fp32 before merging"
            )

    def unmerge(self) -> None:
        """Undo `merge`, up to rounding."""
        if self.merged:
            self.base_layer.weight.data -= self.delta_weight()
            self.merged = False

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
    kind = type(layer)
    in_class = kind.forward is not nn.Linear.forward and not getattr(kind, "computes_linear", False)
    in_object = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
    if in_class or in_object:
        raise ValueError(
            f"{kind.__name__} overrides forward, which may compute something other than W x + b; "
            "use plain LoRA, and do not merge"
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


def _as_tuple(value: Any) -> Any:
    """Return a list, or a single name or number, as a tuple, and an empty list or name as None."""
    if isinstance(value, str | int):
        value = [] if value == "" else [value]
    return (tuple(value) or None) if isinstance(value, Sequence) else value


def _check_config(config: LoRAConfig) -> None:
    """Raise ValueError, naming the field, unless a config's values are possible together."""
    _check_number("r", config.r, int, *RANKS)
    _check_number("lora_alpha", config.lora_alpha, int | float, *ALPHAS)
    _check_number("lora_dropout", config.lora_dropout, int | float, 0, 1)
    _check_pattern("rank_pattern", config.rank_pattern, int, *RANKS)
    _check_pattern("alpha_pattern", config.alpha_pattern, int | float, *ALPHAS)
    if config.layers_to_transform is not None:
        _check_items("layers_to_transform", config.layers_to_transform, int)
    if config.layers_pattern is not None:
        _check_items("layers_pattern", config.layers_pattern, str)
        for pattern in config.layers_pattern:
            _check_regex("layers_pattern", pattern, f"({pattern})")
    if isinstance(config.target_modules, str):
        _check_regex("target_modules", config.target_modules, config.target_modules)
    else:
        _check_items("target_modules", config.target_modules, str)

    for name in ("use_rslora", "use_dora"):
        _check(isinstance(getattr(config, name), bool), name, getattr(config, name), "a bool")
    start = config.init_lora_weights
    _check(start is True or start == "pissa", "init_lora_weights", start, "True or 'pissa'")

    if config.use_dora and start == "pissa":
        raise ValueError("use_dora=True and init_lora_weights='pissa' exclude each other")
    if start == "pissa" and not config.lora_alpha:
        raise ValueError("init_lora_weights='pissa' needs a lora_alpha above 0")
    if config.layers_pattern and not config.layers_to_transform:
        raise ValueError("layers_pattern needs layers_to_transform, as in PEFT")
    if config.layers_to_transform and isinstance(config.target_modules, str):
        raise ValueError("layers_to_transform needs a list of target_modules, as in PEFT")


def _check(is_right: bool, field: str, value: object, wanted: str) -> None:
    if not is_right:
        raise ValueError(f"{field} {value!r:.80} is not {wanted}")


def _check_number(field: str, value: Any, kind: Any, low: float, high: float) -> None:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    what = "a whole number" if kind is int else "a number"
    is_right = is_number and low <= value <= high  # False for NaN
    _check(is_right, field, value, f"{what} from {low} to {high:,.0f}")


def _check_items(field: str, items: Any, kind: type) -> None:
    is_right = isinstance(items, tuple) and all(type(item) is kind for item in items)
    _check(is_right, field, items, f"a list of {kind.__name__}")


def _check_pattern(field: str, pattern: Any, kind: Any, low: float, high: float) -> None:
    """Check a dict that maps regular expressions to numbers."""
    _check(isinstance(pattern, dict), field, pattern, "a dict of names and numbers")
    for key, value in pattern.items():
        _check_regex(field, key, f"({key})")  # as part of a longer expression
        _check_number(f"{field} {key!r:.80}", value, kind, low, high)


def _check_regex(field: str, name: Any, pattern: str) -> None:
    _check(isinstance(name, str), field, name, "a name")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{field} {name!r:.80} is not a regular expression ({error!s:.60})"
        ) from error
