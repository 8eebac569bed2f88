"""The hyper-parameters of LoRA, and the checks that refuse impossible values."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ALL_LINEAR = "all-linear"
RANKS = (1, 1 << 20)  # minimum and maximum
ALPHAS = (0, 3e6)


@dataclass(frozen=True)
class LoRAConfig:
    """Hyper-parameters of LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    The fields are named as in PEFT's `adapter_config.json`. As in PEFT, the two `layers_` fields
    may be a single value. A list or a single value is stored as a tuple. Raises
    ValueError, naming the field, for a value that is not possible, and for fields that exclude each
    other.
    """

    r: int = 8
    lora_alpha: float = 16  # in PEFT: 8
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str = ALL_LINEAR  # see `find_targets`
    use_rslora: bool = False  # see `scaling`
    use_dora: bool = False  # see `DoRALinear`
    init_lora_weights: bool | str = True  # "pissa": see `PiSSALinear`
    layers_to_transform: Sequence[int] | int | None = None  # only these blocks (None: all)
    layers_pattern: Sequence[str] | str | None = None  # name of the list of blocks, such as "h"
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regex of layers -> r
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # regex of layers -> lora_alpha

    def __post_init__(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", _as_tuple(self.target_modules))
        _check_config(self)
        for name in ("rank_pattern", "alpha_pattern"):  # the caller may change the dict later
            object.__setattr__(self, name, dict(getattr(self, name)))

    @property
    def scaling(self) -> float:
        """Return the factor that scales B A x. The factor is alpha / r (paper, 4.1), or
        alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        """
        if self.use_rslora:
            return self.lora_alpha / math.sqrt(self.r)
        return self.lora_alpha / self.r

    @property
    def blocks(self) -> tuple[int, ...]:
        """Return the numbers in `layers_to_transform`. An empty tuple means all blocks."""
        return _as_tuple(self.layers_to_transform) or ()

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
