"""Guards for models of other projects: find the layers that must not be adapted.

An update of such a layer would change another module too, or would be lost, because the model reads
the layer's weight and does not call the layer. In a mixture of experts, PEFT would misread the
adapter's file.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lora.config import ALL_LINEAR, LoRAConfig

WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
# These modules use the weights of their linear layers without calling the layers' `forward`.
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# In transformers, Mamba's mixers do so with one layer, which is named here by the mixer's class.
READ_LAYERS = {"MambaMixer": "dt_proj", "FalconMambaMixer": "dt_proj", "JambaMambaMixer": "dt_proj"}
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


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside `DataParallel`, `DistributedDataParallel`, `AveragedModel` or a model
    of `torch.compile`. Return any other model unchanged."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Find the modules whose weight shares memory with another tensor. An update of one would
    change both. Return a dict from each module's name to a phrase such as "head is tied to wte".
    """
    tied = {}
    for names in _sharing_memory(model):
        for name in names:
            other = next(other for other in names if other != name)
            other = other.removesuffix(".weight").removesuffix(".codes")
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "codes"):  # of a linear layer, or of a quantised one
                tied[module] = f"{module} is tied to {other}"
    return tied


def _sharing_memory(model: nn.Module) -> list[list[str]]:
    """Return groups of names of parameters and buffers that lie in the same memory, even in part.

    Tensors without memory, such as on the meta device, are the same only if they are one object.
    """
    spans = []
    for name, tensor in _tensors(model):
        start = tensor.data_ptr() if tensor.layout == torch.strided else 0
        steps = zip(tensor.shape, tensor.stride(), strict=True) if start else ()
        reach = sum((size - 1) * stride for size, stride in steps)  # of the last element
        end = start + (1 + reach) * tensor.itemsize if tensor.numel() else start
        if start == end or start == 0:
            start = id(tensor)
            end = start + 1
        spans.append((str(tensor.device), start, end, name))

    groups: list[list[str]] = []
    reached = ("", 0)  # the device, and the largest end there
    for device, start, end, name in sorted(spans):
        if (device, start) < reached and device == reached[0]:
            groups[-1].append(name)
        else:
            groups.append([name])
        reached = max(reached, (device, end))
    return [names for names in groups if len(names) > 1]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter and buffer by name. If a layer has several places in the model, its
    tensors have a name for each place. But a layer of a block that is used several times has one
    place, in this block."""
    places: list[tuple[str, nn.Module]] = [("", model)]
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        places += [
            (f"{prefix}{key}.", child)
            for key, child in parent._modules.items()
            if child is not None
        ]
    for prefix, module in places:
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                yield prefix + name, tensor


def reads_weight(parent: nn.Module, layer: str) -> bool:
    """Return whether a module of transformers uses the weight of its layer without a call."""
    return READ_LAYERS.get(type(parent).__name__) == layer


def refuse_unfit(target: str, name: str, model: nn.Module) -> None:
    """Raise ValueError if the module `name`, which the target matches, cannot be adapted."""
    refused = f"target module {target!r} is refused:"
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        raise ValueError(f"{refused} {name} is an embedding, not a linear layer")
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"target module {target!r} matches {name}, a {type(module).__name__}; "
            "only linear layers, nn.Linear, are adapted"
        )
    if module.weight.is_meta and hasattr(module, "_hf_hook"):
        raise ValueError(f"{refused} accelerate has offloaded {name}; adapt the model before that")

    above, _, last = name.rpartition(".")
    parent = model.get_submodule(above)
    if isinstance(parent, READ_WEIGHTS) or reads_weight(parent, last):
        raise ValueError(f"{refused} {type(parent).__name__} bypasses the forward of {name}")


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
