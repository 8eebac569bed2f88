"""Find the layers to adapt, and each one's rank and alpha, by PEFT's rules.

Names are those of transformers' GPT2LMHeadModel, such as `transformer.h.0.attn.c_attn`.
"""

import re
from dataclasses import replace

from torch import nn

from lora.layer import LoRAConfig
from lora.slices import SLICES

TRANSFORMER, HEAD = "transformer.", "lm_head"
REFUSED = {
    HEAD: "the head is tied to wte, and an update of one would change both",
    "wte": "it is tied to the head",
    "wpe": "it is an embedding, not a linear layer",
}


def target_modules(names: list[str]) -> tuple[str, ...] | str:
    """Return a command line's names in `LoRAConfig`'s form: "all-linear" alone is a string."""
    return "all-linear" if names == ["all-linear"] else tuple(names)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, set[str]]:
    """Return the linear layers to adapt, in module order, each with its slices (empty: all of it).

    `target_modules` is "all-linear" (all but the head), a regular expression that matches full
    names, or a list of full names and their endings after a dot: `c_proj` is the attention's and
    the MLP's. `layers_to_transform` limits endings to these blocks. Raises ValueError if a target,
    block or pattern matches nothing, or a target is not a linear layer.
    """
    modules = {TRANSFORMER + name: m for name, m in model.named_modules()}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    targets, blocks = config.target_modules, config.layers_to_transform
    if isinstance(targets, str) and blocks:
        raise ValueError("layers_to_transform needs a list of target modules, as in PEFT")
    found: dict[str, set[str]] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        names, slices = _match(target, config, [*modules, HEAD], linear)
        if not names:
            raise ValueError(
                f"target module {target!r} is not in the model"
                f"{' in these layers' if blocks else ''}"
                f"{' by a full name' if isinstance(targets, str) else ''}; it has "
                f"{', '.join(sorted(set(map(_last, linear))))}"
            )
        for name in names:
            if reason := REFUSED.get(_last(name)):
                raise ValueError(f"target module {target!r} is refused: {reason}")
            if name not in linear:
                raise ValueError(
                    f"target module {target!r} matches "
                    f"{name.removeprefix(TRANSFORMER)}, a "
                    f"{type(modules[name]).__name__}; only linear layers are adapted"
                )
            if name in found and bool(found[name]) != bool(slices):
                raise ValueError(f"target module {target!r} is named whole and by a slice")
            found[name] = found.get(name, set()) | slices
    if missing := set(blocks or ()) - set(map(_block, found)):
        raise ValueError(f"layer {min(missing)} has no target module")
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(_matches(key, name) for name in found):
            raise ValueError(f"pattern {key!r} matches no adapted layer")
    return {name.removeprefix(TRANSFORMER): found[name] for name in modules if name in found}


def _match(
    target: str, config: LoRAConfig, names: list[str], linear: list[str]
) -> tuple[list[str], set[str]]:
    """Return the names that a target matches, and its slice: {"q"}, {"k"}, {"v"} or none."""
    if config.target_modules == "all-linear":
        return linear, set()
    if isinstance(config.target_modules, str):
        return [name for name in names if re.fullmatch(target, name)], set()
    slices = {_last(target)}.intersection(SLICES) if "." in target else set()
    suffix = target.rpartition(".")[0] if slices else target
    if slices and _last(suffix) != "c_attn":
        raise ValueError(f"target module {target!r}: only c_attn has slices")
    blocks = config.layers_to_transform
    return [
        name
        for name in names
        if name == suffix
        or (f".{name}".endswith(f".{suffix}") and (not blocks or _block(name) in blocks))
    ], slices


def layer_config(config: LoRAConfig, name: str) -> LoRAConfig:
    """Return `config` with one layer's rank and alpha: those of the first pattern that matches."""
    full = TRANSFORMER + name
    r = next((r for key, r in config.rank_pattern.items() if _matches(key, full)), config.r)
    alpha = next(
        (alpha for key, alpha in config.alpha_pattern.items() if _matches(key, full)),
        config.lora_alpha,
    )
    return replace(config, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})


def _matches(key: str, name: str) -> bool:
    """Return whether a pattern, a regular expression, matches the name or its end after a dot."""
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def _block(name: str) -> int | None:
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)  # as in PEFT: transformer.h.3.attn -> 3
    return int(match[1]) if match else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]
