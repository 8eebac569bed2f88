"""Find the layers to adapt, and the rank and alpha of each layer, by PEFT's rules.

A full name is the name of a module in PEFT (`lora/peft_view.py`). For example, the full name of
`h.0.attn.c_attn` in our GPT-2 is `transformer.h.0.attn.c_attn`, as in transformers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lora.config import LoRAConfig
from lora.layer import LoRALinear
from lora.peft_view import peft_view

ALL_LINEAR = "all-linear"
SLICES = ("q", "k", "v")  # slices of a fused layer's output, in this order
# These modules use the weights of their linear layers without calling the layers' `forward`. In
# transformers, Mamba's mixers do so with one layer, which is named here by the mixer's class.
WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
READ_LAYERS = {"MambaMixer": "dt_proj", "FalconMambaMixer": "dt_proj", "JambaMambaMixer": "dt_proj"}


def target_modules(names: Sequence[str]) -> tuple[str, ...] | str:
    """Convert names from a command line to `LoRAConfig.target_modules`: the string "all-linear", or
    a tuple of names.
    """
    if list(names) == [ALL_LINEAR]:
        return ALL_LINEAR
    return tuple(names)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, set[str]]:
    """Return the names of the layers to adapt, in module order, each with the set of output slices
    to adapt, such as {"q"}. An empty set means the whole layer.

    `target_modules` is "all-linear", a regular expression that must match a full name, or a list of
    full names and suffixes. "all-linear" means every linear layer except tied layers, the layers of
    `READ_LAYERS`, and the head that a model of transformers names (`get_output_embeddings`). In any
    other model, an untied head is like every other layer. As an example of a suffix, `c_proj`
    matches each full name that ends in `.c_proj`: in GPT-2, a layer of the attention and a layer of
    the MLP. With `layers_to_transform`, a suffix matches only in the blocks with these numbers.
    `layers_pattern` names the list of blocks, such as `h`.

    Raises ValueError if a target, block or pattern matches nothing, if a target cannot be adapted,
    if the model has an adapter already, or if it is wrapped for parallel training or torch.compile.
    """
    if inner_model(model) is not model:
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}; adapt the inner model, then wrap it"
        )
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has an adapter already; `unwrap` it first")
    view = peft_view(model)
    names = {view.prefix + name: name for name, _ in model.named_modules() if name}
    modules = {name: model.get_submodule(own) for name, own in names.items()}
    tied = tied_modules(model)

    found: dict[str, set[str]] = {}
    for target in _targets(config):
        if config.target_modules == ALL_LINEAR:
            slices: set[str] = set()
            matches = _all_linear(model, modules, tied)
        else:
            suffix, slices = _split_slice(target, view.fused)
            matches = [name for name in (*modules, *tied) if _is_named(name, suffix, config)]
        if not matches:
            raise ValueError(_not_found(target, config, modules))
        for name in matches:
            _check_target(target, names.get(name, name), model, tied.get(name))
            if name in found and bool(found[name]) != bool(slices):
                raise ValueError(f"target module {target!r} is named both whole and by a slice")
            found[name] = found.get(name, set()) | slices

    _check_all_used(config, found)
    return {own: found[name] for name, own in names.items() if name in found}


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
    change both. Return a dict from each module's full name to a phrase such as "the head is tied to
    wte".
    """
    view = peft_view(model)
    tied = {}
    for names in _sharing_memory(model):
        for name in names:
            other = next(other for other in names if other != name)
            other = other.removesuffix(".weight").removesuffix(".codes")
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "codes"):  # of a linear layer, or of a quantised one
                tied[view.prefix + module] = (
                    f"{view.prefix}{module} is tied to {view.prefix}{other}"
                )
    return tied | dict(view.ties)


def _sharing_memory(model: nn.Module) -> list[list[str]]:
    """Return groups of names of parameters and buffers that lie in the same memory, even in part.

    Tensors without memory, such as on the meta device, are the same only if they are one object.
    """
    spans = []
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
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


def _targets(config: LoRAConfig) -> tuple[str, ...]:
    """Return the target names as a tuple. If the target is a regular expression, the tuple contains
    only this expression.
    """
    targets = config.target_modules
    return (targets,) if isinstance(targets, str) else targets


def _all_linear(
    model: nn.Module, modules: Mapping[str, nn.Module], tied: Mapping[str, str]
) -> list[str]:
    """Return the full names of the layers that "all-linear" means in PEFT, except tied layers and
    layers without a call, which PEFT adapts without an effect.

    In a model from the transformers library, PEFT leaves out the head, and counts Conv1D layers as
    linear.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    matches = []
    for name, module in modules.items():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        parent, _, last = name.rpartition(".")
        is_called = READ_LAYERS.get(type(modules.get(parent)).__name__) != last
        if is_linear and is_called and module is not head and name not in tied:
            matches.append(name)
    return matches


def _split_slice(target: str, fused: str | None) -> tuple[str, set[str]]:
    """Split a target such as `c_attn.q` into `c_attn` and {"q"}. Other targets have no slice."""
    layer, _, last = target.rpartition(".")
    if not fused or not layer or last not in SLICES:
        return target, set()
    if _last(layer) != fused:
        raise ValueError(f"target module {target!r}: only {fused} has slices")
    return layer, {last}


def _is_named(name: str, target: str, config: LoRAConfig) -> bool:
    """Return whether a target matches a full name. A regular expression must match all of the name.
    Any other target must be the whole name, or a suffix of the name that begins after a dot.
    """
    if isinstance(config.target_modules, str):
        return re.fullmatch(target, name) is not None
    if name == target:
        return True
    blocks = config.layers_to_transform
    in_blocks = not blocks or _block(name, config) in blocks
    return in_blocks and name.endswith(f".{target}")


def _not_found(target: str, config: LoRAConfig, modules: Mapping[str, nn.Module]) -> str:
    endings = {_last(name) for name, module in modules.items() if isinstance(module, nn.Linear)}
    if not endings:
        return "the model has no linear layer, nn.Linear, to adapt"
    message = f"target module {target!r} is not in the model"
    if config.layers_to_transform:
        message += " in these layers"
        found = [_block(name, config) for name in modules if name.endswith(f".{target}")]
        blocks = [block for block in found if block is not None]
        if blocks:
            return f"{message}, only in layers {min(blocks)} .. {max(blocks)}"
    if isinstance(config.target_modules, str):
        message += " by a full name"
    return f"{message}; it has {', '.join(sorted(endings))}"


def _check_target(target: str, own: str, model: nn.Module, tied: str | None) -> None:
    """Raise ValueError if the module that the target matches cannot be adapted.

    `own` is the module's name in the model. `tied` is the phrase from `tied_modules`, if the module
    is tied.
    """
    refused = f"target module {target!r} is refused:"
    if tied:
        raise ValueError(f"{refused} {tied}, and an update of one would change the other")

    module = model.get_submodule(own)
    if isinstance(module, nn.Embedding):
        raise ValueError(f"{refused} {own} is an embedding, not a linear layer")
    if not isinstance(module, nn.Linear):
        kind = type(module).__name__
        raise ValueError(
            f"target module {target!r} matches {own}, a {kind}; "
            "only linear layers, nn.Linear, are adapted"
        )

    if module.weight.is_meta and hasattr(module, "_hf_hook"):
        raise ValueError(f"{refused} accelerate has offloaded {own}; adapt the model before that")

    parent = model.get_submodule(own.rpartition(".")[0])
    kind = type(parent).__name__
    if isinstance(parent, READ_WEIGHTS) or READ_LAYERS.get(kind) == _last(own):
        raise ValueError(f"{refused} {kind} bypasses the forward of {own}")


def _check_all_used(config: LoRAConfig, found: Iterable[str]) -> None:
    """Raise ValueError if a block of `layers_to_transform` has no adapted layer, or if a key of
    `rank_pattern` or `alpha_pattern` matches no adapted layer."""
    missing = set(config.layers_to_transform or ()) - {_block(name, config) for name in found}
    if missing:
        raise ValueError(f"layer {min(missing)} has no target module")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(pattern, name) for name in found):
            raise ValueError(f"pattern {pattern!r} matches no adapted layer")


def layer_config(config: LoRAConfig, name: str) -> LoRAConfig:
    """Return `config` with the rank and alpha of one layer. `name` is the layer's full name. If
    several patterns match the name, the first pattern wins.
    """
    r = config.r
    for pattern, rank in config.rank_pattern.items():
        if pattern_matches(pattern, name):
            r = rank
            break
    lora_alpha = config.lora_alpha
    for pattern, alpha in config.alpha_pattern.items():
        if pattern_matches(pattern, name):
            lora_alpha = alpha
            break
    return replace(config, r=r, lora_alpha=lora_alpha, rank_pattern={}, alpha_pattern={})


def pattern_matches(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches the whole name, or a suffix of the name that
    begins after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _block(name: str, config: LoRAConfig) -> int | None:
    """Return the number of a module's block by PEFT's rule, such as 3 for transformer.h.3.mlp."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    for pattern in config.layers_pattern or ():
        match = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name)
        if match:
            break
    return int(match[1]) if match else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
