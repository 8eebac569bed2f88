"""Guards for models of other projects: find the layers that must not be adapted or merged.

An update of such a layer would change another module too, or would be lost, because the model reads
the layer's weight and does not call the layer. In a mixture of experts, PEFT would misread the
adapter's file. `lora/probe.py` finds what a model's structure does not show.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lora.config import ALL_LINEAR, LoRAConfig

WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
# These modules use the weights of their linear layers without calling the layers' `forward`.
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# For each family of models: names of layers that PEFT mistakes for experts. If a target has such a
# name, PEFT adapts a parameter of the mixture of experts instead, such as the experts' 3-D weight.
# PEFT does so even if the target is a dense layer or a shared expert (`_MOE_TARGET_MODULE_MAPPING`
# in PEFT).
EXPERT_NAMES: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


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

    reason = _unfit(model, name, module)
    if reason:
        raise ValueError(f"{refused} {reason}")


def unfit_layers(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that cannot be adapted, and why, by name. "all-linear" leaves out
    these layers."""
    reasons = {
        name: _unfit(model, name, module)
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear)
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _unfit(model: nn.Module, name: str, layer: nn.Linear) -> str | None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, READ_WEIGHTS):
        return f"{type(parent).__name__} bypasses the forward of {name}"
    if _has_own_forward(layer) and not layer.weight.is_meta:
        _, y = _small_call(layer)
        if not isinstance(y, Tensor) or y.shape != (2, layer.out_features):
            return f"the forward of {name}, a {type(layer).__name__}, does not return (..., out)"
    return None


def _has_own_forward(layer: nn.Linear) -> bool:
    """Return whether a layer's forward is not the forward of nn.Linear.

    A quantised layer sets the class attribute `computes_linear = True`. The package accelerate
    replaces the `forward` of a layer object, in order to move x to the layer's device, and sets
    `_hf_hook`.
    """
    kind = type(layer)
    in_class = kind.forward is not nn.Linear.forward and not getattr(kind, "computes_linear", False)
    in_object = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
    return in_class or in_object


@torch.no_grad()
def _small_call(layer: nn.Linear) -> tuple[Tensor, Any]:
    """Return an x (2, in), and the output of the layer's forward, or its error."""
    dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.get_default_dtype()
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device, dtype=dtype)
    x = x.view(2, layer.in_features)
    try:
        with torch.random.fork_rng():
            return x, layer.forward(x.clone())  # some layers change x
    except Exception as error:
        return x, error


def check_adaptable(layer: nn.Linear) -> torch.device:
    """Return the layer's device. Raises ValueError if A and B cannot be added to the layer."""
    stored = next(chain(layer.parameters(), layer.buffers()))  # `weight` may have to be decoded
    if stored.is_complex():
        raise ValueError("the weight is complex, but A and B are real; leave out the layer")
    return stored.device


def check_mergeable(layer: nn.Linear) -> None:
    """Raise ValueError as `stored_weight` does, or if an update of W would be lost. In bf16, adding
    a small update to W would round it away, and torch ignores a change on the meta device."""
    weight = stored_weight(layer)
    if weight.is_meta:
        raise ValueError("the weight is on the meta device, or offloaded by accelerate; load it")
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the weight is in {weight.dtype}, and merging into it would round part of the "
            "update away; convert the model to fp32 before merging"
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


def check_linear(layer: nn.Linear) -> None:
    """Raise ValueError unless the layer's forward is W x + b, with `weight` as W.

    A subclass of `nn.Linear` may override `forward` and still compute W x + b. One call on a small
    input tells.
    """
    refuse_hooks(layer)
    if _has_own_forward(layer) and not _computes_linear(layer):
        raise ValueError(
            f"{type(layer).__name__} overrides forward, which may compute something other than "
            "W x + b; use plain LoRA, and do not merge"
        )


def _computes_linear(layer: nn.Linear) -> bool:
    if layer.weight.is_meta or not layer.weight.is_floating_point():
        return False
    x, y = _small_call(layer)
    expected = F.linear(x, layer.weight, layer.bias)
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    error = (y - expected).norm() / expected.norm()
    return bool(error <= 8 * torch.finfo(x.dtype).eps)


def refuse_hooks(layer: nn.Module) -> None:
    """Raise ValueError if the layer has forward hooks, which may change x or the output, and which
    would be lost with the layer."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ValueError(
            f"{type(layer).__name__} has a forward hook, which may change x or the output; "
            "remove the hook, or use plain LoRA, and do not merge"
        )


def refuse_merged(layer: Any, *_: object) -> None:
    """Raise ValueError if a LoRA layer is merged. Called before its state dict is taken or loaded.

    A merged layer's state dict would contain the update twice, in W and as A and B. Loading a state
    dict into a merged layer would set W to a weight without the update, and `unmerge` would then
    subtract the update from this weight.
    """
    if layer.merged:
        raise ValueError("the adapter is merged; unmerge it before taking or loading a state dict")


_readable = ContextVar("_readable", default=False)


@contextmanager
def readable_weights() -> Iterator[None]:
    """Let a model compute with the W of LoRA layers, as `probe` does to find such a layer."""
    token = _readable.set(True)
    try:
        yield
    finally:
        _readable.reset(token)


class DescriptionOfWeight(Tensor):
    """A part of W for code that reads `weight.dtype` or `weight.device`. Raises ValueError if the
    code computes with it, because the result would lack the update."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":  # not an attribute
            raise ValueError(
                "the model computes with `weight` of a LoRA layer, which lacks the update; "
                "call the layer, or leave it out of target_modules (`lora.probe` names it)"
            )
        return super().__torch_function__(  # type: ignore[no-untyped-call]
            func, types, args, kwargs
        )


def describe_weight(layer: nn.Linear) -> Tensor:
    """Return a tensor with W's dtype and device, without rows, (0, in), which refuses computations.

    A quantised layer stores `no_rows`, because reading its `weight` would decode W.
    """
    if _readable.get():
        return layer.weight
    no_rows = getattr(layer, "no_rows", None)
    rows: Tensor = layer.weight[:0] if no_rows is None else no_rows
    return rows.as_subclass(DescriptionOfWeight)


def weighted_sum(tensor: Tensor) -> float:
    """Return a sum that also differs if two numbers change places. The weights are 1 to 2."""
    values = tensor.detach().cpu().double().flatten()
    weights = torch.linspace(1, 2, len(values), dtype=torch.float64)
    return (values * weights).sum().item()


def in_precision_of(weight: Tensor, x: Tensor) -> Tensor:
    """Return x in the precision of a weight of the adapter. Under autocast, leave the cast to each
    matmul, which is faster. But autocast does not cast fp64."""
    may_be_cast = not x.is_meta and x.dtype != torch.float64
    if may_be_cast and torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Return a context for products of weights, which autocast around the caller would round."""
    device = tensor.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def warn_about_gaps(model: nn.Module, config: LoRAConfig, layers: Iterable[str]) -> None:
    """Warn if "all-linear" leaves out layers or experts, or if `save_adapter` will refuse the
    adapter."""
    unfit = unfit_layers(model) if config.target_modules == ALL_LINEAR else {}
    if unfit:
        warnings.warn(f"all-linear leaves out layers: {'; '.join(unfit.values())}", stacklevel=3)
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
    """Return a message if PEFT would mistake an adapted layer for experts. Otherwise return
    None."""
    expert_names = _expert_names(model)
    for name in layers:
        if name.rpartition(".")[2] in expert_names:
            return (
                f"PEFT would mistake {name} for the experts and lose the update; choose "
                f"target_modules without {', '.join(expert_names)}"
            )
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
    family: str = getattr(getattr(model, "config", None), "model_type", "")
    return EXPERT_NAMES.get(families.get(family, ""), ())
