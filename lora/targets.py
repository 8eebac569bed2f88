"""Find the layers to adapt, and each one's rank and alpha, by PEFT's rules.

Names are those of transformers' GPT2LMHeadModel, such as `transformer.h.0.attn.c_attn`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from lora.layer import LoRAConfig

TRANSFORMER = "transformer."
HEAD = "lm_head"
ALL_LINEAR = "all-linear"
FUSED = "c_attn"  # the layer that makes q, k and v in one
SLICES = ("q", "k", "v")  # of its output, in this order
REFUSED = {
    HEAD: "the head is tied to wte, and an update of one would change both",
    "wte": "it is tied to the head",
    "wpe": "it is an embedding, not a linear layer",
}


def target_modules(names: Sequence[str]) -> tuple[str, ...] | str:
    """Return a command line's names in `LoRAConfig`'s form: "all-linear" alone is a string."""
    if list(names) == [ALL_LINEAR]:
        return ALL_LINEAR
    return tuple(names)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, set[str]]:
    """Return the linear layers to adapt, in module order, each with its slices (empty: all of it).

    `target_modules` is "all-linear" (all but the head), a regular expression that matches full
    names, or a list of full names and their endings after a dot: `c_proj` is the attention's and
    the MLP's. `layers_to_transform` limits endings to these blocks. Raises ValueError if a target,
    block or pattern matches nothing, or a target is not a linear layer.
    """
    modules = {TRANSFORMER + name: module for name, module in model.named_modules()}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]

    if isinstance(config.target_modules, str):
        if config.layers_to_transform:
            raise ValueError("layers_to_transform needs a list of target modules, as in PEFT")
        targets = [config.target_modules]
    else:
        targets = list(config.target_modules)

    found: dict[str, set[str]] = {}
    for target in targets:
        matches, slices = _match(target, config, [*modules, HEAD], linear)
        if not matches:
            raise ValueError(_not_found(target, config, linear))
        for name in matches:
            _check_target(target, name, modules)
            if name in found and bool(found[name]) != bool(slices):
                raise ValueError(f"target module {target!r} is named whole and by a slice")
            found[name] = found.get(name, set()) | slices

    _check_all_used(config, found)
    return {name.removeprefix(TRANSFORMER): found[name] for name in modules if name in found}


def _match(
    target: str, config: LoRAConfig, names: list[str], linear: list[str]
) -> tuple[list[str], set[str]]:
    """Return the names that a target matches, and its slice: {"q"}, {"k"}, {"v"} or none."""
    if config.target_modules == ALL_LINEAR:
        return linear, set()
    if isinstance(config.target_modules, str):
        return [name for name in names if re.fullmatch(target, name)], set()
    suffix, slices = _split_slice(target)
    return [name for name in names if _is_named(name, suffix, config)], slices


def _split_slice(target: str) -> tuple[str, set[str]]:
    """Split `c_attn.q` into the layer's name and its slice; other targets have no slice."""
    layer, _, last = target.rpartition(".")
    if not layer or last not in SLICES:
        return target, set()
    if _last(layer) != FUSED:
        raise ValueError(f"target module {target!r}: only {FUSED} has slices")
    return layer, {last}


def _is_named(name: str, suffix: str, config: LoRAConfig) -> bool:
    """Return whether a target names this module, by its full name or by an ending after a dot."""
    if name == suffix:
        return True
    blocks = config.layers_to_transform
    in_blocks = not blocks or _block(name) in blocks
    return in_blocks and f".{name}".endswith(f".{suffix}")


def _not_found(target: str, config: LoRAConfig, linear: list[str]) -> str:
    message = f"target module {target!r} is not in the model"
    if config.layers_to_transform:
        message += " in these layers"
    if isinstance(config.target_modules, str):
        message += " by a full name"
    endings = sorted({_last(name) for name in linear})
    return f"{message}; it has {', '.join(endings)}"


def _check_target(target: str, name: str, modules: dict[str, nn.Module]) -> None:
    """Raise ValueError unless the module that a target matches can be adapted."""
    reason = REFUSED.get(_last(name))
    if reason:
        raise ValueError(f"target module {target!r} is refused: {reason}")
    if not isinstance(modules[name], nn.Linear):
        kind = type(modules[name]).__name__
        raise ValueError(
            f"target module {target!r} matches {name.removeprefix(TRANSFORMER)}, a {kind}; "
            "only linear layers are adapted"
        )


def _check_all_used(config: LoRAConfig, found: Iterable[str]) -> None:
    """Raise ValueError for a block or a pattern that no adapted layer has."""
    missing = set(config.layers_to_transform or ()) - {_block(name) for name in found}
    if missing:
        raise ValueError(f"layer {min(missing)} has no target module")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(_matches(pattern, name) for name in found):
            raise ValueError(f"pattern {pattern!r} matches no adapted layer")


def layer_config(config: LoRAConfig, name: str) -> LoRAConfig:
    """Return `config` with one layer's rank and alpha: those of the first pattern that matches."""
    full_name = TRANSFORMER + name
    r = config.r
    for pattern, rank in config.rank_pattern.items():
        if _matches(pattern, full_name):
            r = rank
            break
    lora_alpha = config.lora_alpha
    for pattern, alpha in config.alpha_pattern.items():
        if _matches(pattern, full_name):
            lora_alpha = alpha
            break
    return replace(config, r=r, lora_alpha=lora_alpha, rank_pattern={}, alpha_pattern={})


def _matches(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches the name, or its end after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _block(name: str) -> int | None:
    """Return the number of the block that a module is in: transformer.h.3.attn -> 3, as PEFT."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(match[1]) if match else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
