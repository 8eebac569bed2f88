"""Find the layers to adapt, and the rank and alpha of each layer, by PEFT's rules.

The rules are about *PEFT names*. A module's PEFT name is its name in `model.named_modules()`, with
`peft_view(model).prefix` before it. Only our GPT-2 has a prefix, `transformer.`, because PEFT sees
it as the GPT-2 of transformers: `h.0.attn.c_attn` has the PEFT name `transformer.h.0.attn.c_attn`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora.config import ALL_LINEAR, LoRAConfig
from lora.guards import inner_model, refuse_unfit, tied_modules, unfit_layers
from lora.layer import LoRALinear
from lora.peft_view import peft_view

SLICES = ("q", "k", "v")  # slices of a fused layer's output, in this order


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

    `target_modules` is "all-linear", a regular expression that must match a whole PEFT name, or a
    list. An item of the list matches the PEFT names that equal it or end in it after a dot:
    `c_proj` matches two layers of each block of GPT-2, in the attention and in the MLP. With
    `layers_to_transform`, an end of a name matches only in the blocks with these numbers.
    `layers_pattern` names the list of blocks, such as `h`.

    "all-linear" means every linear layer except tied layers, `unfit_layers`, and the head that a
    model of transformers names (`get_output_embeddings`). In any other model, an untied head is
    like every other layer.

    Raises ValueError if a target or block matches nothing, if a target cannot be adapted, if the
    model has an adapter already, or if it is wrapped for parallel training or torch.compile.
    """
    _refuse_model(model)
    view = peft_view(model)
    names = {view.prefix + name: name for name, _ in model.named_modules() if name}  # by PEFT name
    modules = {peft_name: model.get_submodule(name) for peft_name, name in names.items()}
    tied = {view.prefix + name: reason for name, reason in tied_modules(model).items()}
    tied |= view.ties

    found: dict[str, set[str]] = {}
    targets = config.target_modules
    for target in [targets] if isinstance(targets, str) else targets:
        if targets == ALL_LINEAR:
            slices: set[str] = set()
            unfit = {view.prefix + name for name in unfit_layers(model)}
            every = _all_linear(model, modules, tied)
            matches = [name for name in every if name not in unfit] or every
        else:
            layer, slices = _split_slice(target, view.fused)
            matches = [name for name in (*modules, *tied) if _is_named(name, layer, config)]
        if not matches:
            raise ValueError(_not_found(target, config, modules))
        for peft_name in matches:
            if peft_name in tied:
                raise ValueError(
                    f"target module {target!r} is refused: {tied[peft_name]}, and an update of one "
                    "would change the other"
                )
            refuse_unfit(target, names[peft_name], model)
            if peft_name in found and bool(found[peft_name]) != bool(slices):
                raise ValueError(f"target module {target!r} is named both whole and by a slice")
            found[peft_name] = found.get(peft_name, set()) | slices

    missing = set(config.blocks) - {_block(peft_name, config) for peft_name in found}
    if missing:
        raise ValueError(f"layer {min(missing)} has no target module")
    return {name: found[peft_name] for peft_name, name in names.items() if peft_name in found}


def _refuse_model(model: nn.Module) -> None:
    if inner_model(model) is not model:
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}; adapt the inner model, then wrap it"
        )
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has an adapter already; `unwrap` it first")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a linear layer, which only its parent could replace; put it in an "
            "nn.Sequential, or wrap it in LoRALinear"
        )


def _all_linear(
    model: nn.Module, modules: Mapping[str, nn.Module], tied: Mapping[str, str]
) -> list[str]:
    """Return the PEFT names of the layers that "all-linear" means in PEFT, except tied layers.

    In a model from the transformers library, PEFT leaves out the head, and counts Conv1D layers as
    linear.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    matches = []
    for name, module in modules.items():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and module is not head and name not in tied:
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


def _is_named(peft_name: str, target: str, config: LoRAConfig) -> bool:
    """Return whether a target matches a module, as `find_targets` describes."""
    if isinstance(config.target_modules, str):
        return re.fullmatch(target, peft_name) is not None
    if peft_name == target:
        return True
    in_blocks = not config.blocks or _block(peft_name, config) in config.blocks
    return in_blocks and peft_name.endswith(f".{target}")


def _not_found(target: str, config: LoRAConfig, modules: Mapping[str, nn.Module]) -> str:
    endings = {_last(name) for name, module in modules.items() if isinstance(module, nn.Linear)}
    if not endings:
        return "the model has no linear layer, nn.Linear, to adapt"
    message = f"target module {target!r} is not in the model"
    if config.blocks:
        message += " in these layers"
        found = [_block(name, config) for name in modules if name.endswith(f".{target}")]
        blocks = [block for block in found if block is not None]
        if blocks:
            return f"{message}, only in layers {min(blocks)} .. {max(blocks)}"
    if isinstance(config.target_modules, str):
        message += " by a full name"
    return f"{message}; it has {', '.join(sorted(endings))}"


def refuse_unused_patterns(config: LoRAConfig, peft_names: Iterable[str]) -> None:
    """Raise ValueError if a key of `rank_pattern` or `alpha_pattern` matches no adapted layer."""
    names = list(peft_names)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(pattern, name) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no adapted layer")


def layer_config(config: LoRAConfig, peft_name: str) -> LoRAConfig:
    """Return `config` with the rank and alpha of the layer with this PEFT name. If several
    patterns match the name, the first pattern wins.
    """
    r = config.r
    for pattern, rank in config.rank_pattern.items():
        if pattern_matches(pattern, peft_name):
            r = rank
            break
    lora_alpha = config.lora_alpha
    for pattern, alpha in config.alpha_pattern.items():
        if pattern_matches(pattern, peft_name):
            lora_alpha = alpha
            break
    return replace(config, r=r, lora_alpha=lora_alpha, rank_pattern={}, alpha_pattern={})


def pattern_matches(pattern: str, peft_name: str) -> bool:
    """Return whether a regular expression matches the PEFT name, or its end after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", peft_name) is not None


def _block(peft_name: str, config: LoRAConfig) -> int | None:
    """Return the number of a module's block by PEFT's rule, such as 3 for transformer.h.3.mlp."""
    match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", peft_name)
    for pattern in config.layers_pattern or ():  # which may have groups of its own
        match = re.match(rf"(?:.*?\.)?{pattern}\.(?P<idx>\d+)\.", peft_name)
        if match:
            break
    number = match and match["idx"]  # None after the `h` of "h|layers"
    return int(number) if number else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
