"""Recognise mixtures of experts, which store experts in 3-D parameters, not in `nn.Linear`s, and
layers that PEFT cannot read."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.targets import ALL_LINEAR

# For each family of models: names of layers that PEFT mistakes for experts. If a target has such a
# name, PEFT adapts a parameter of the mixture of experts instead, such as the experts' 3-D weight.
# PEFT does so even if the target is a dense layer or a shared expert (`_MOE_TARGET_MODULE_MAPPING`
# in PEFT).
EXPERT_NAMES: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# PEFT refuses an adapter of such a layer in these families (`_check_lora_target_modules_mamba`).
REFUSED_FAMILIES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
REFUSED_LAYER = "out_proj"


def warn_about_experts(model: nn.Module, config: LoRAConfig, layers: Iterable[str]) -> None:
    """Warn if "all-linear" leaves out experts, or if `save_adapter` will refuse the adapter."""
    experts = expert_weights(model)
    if experts and config.target_modules == ALL_LINEAR:
        total = sum(weight.numel() for weight in model.parameters())
        share = sum(weight.numel() for weight in experts.values()) / total
        names = sorted({name.rpartition(".")[2] for name in experts})
        warnings.warn(
            f"all-linear leaves out {share:.0%} of the model's weights, because the experts are "
            f"not nn.Linear: {', '.join(names)} (the first is {next(iter(experts))})",
            stacklevel=3,
        )
    misread = misread_by_peft(model, layers)
    if misread:
        warnings.warn(f"save_adapter will refuse this adapter: {misread}", stacklevel=3)


def misread_by_peft(model: nn.Module, layers: Iterable[str]) -> str | None:
    """Return a message if PEFT would mistake an adapted layer for experts, or would refuse it.
    Otherwise return None."""
    expert_names = _expert_names(model)
    refused = (REFUSED_LAYER,) if _family(model) in REFUSED_FAMILIES else ()
    for name in layers:
        last = name.rpartition(".")[2]
        if last in expert_names:
            return (
                f"PEFT would mistake {name} for the experts and lose the update; choose "
                f"target_modules without {', '.join(expert_names)}"
            )
        if last in refused:
            return f"PEFT refuses {name}; choose target_modules without {last}"
    return None


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the 3-D parameters that stack the experts' matrices, (experts, m, n), by name."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.ndim == 3 and min(weight.shape) > 1 and not _is_convolution(model, name)
    }


def _is_convolution(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.modules.conv._ConvNd)


def _expert_names(model: Any) -> tuple[str, ...]:
    """Return the names in `EXPERT_NAMES` for the model's family in transformers, otherwise ()."""
    conversions = sys.modules.get("transformers.conversion_mapping")
    families: dict[str, str] = getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {})
    return EXPERT_NAMES.get(families.get(_family(model), ""), ())


def _family(model: Any) -> str:
    """Return the name of the model's family in transformers, such as "mamba2", otherwise ""."""
    return getattr(getattr(model, "config", None), "model_type", "")
