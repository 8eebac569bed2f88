"""Write adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora.atomic import replacing
from lora.config import ALL_LINEAR, LoRAConfig
from lora.guards import expert_weights, inner_model, misread_by_peft, unfit_layers
from lora.inject import lora_layers
from lora.layer import LoRALinear
from lora.peft_config import CONFIG, peft_config
from lora.peft_view import peft_view
from lora.quantised import quantisation
from lora.targets import pattern_matches
from lora.tensors import write_tensors

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_SHA256 = "base_sha256"  # in the header of WEIGHTS: the hash of the base's weights
Number = TypeVar("Number", int, float)
QUANTISED = "base_quantised"  # also in the header: "nf4" or "int8", if the base was quantised


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    base: str = "",
    base_sha256: str = "",
    revision: str | None = None,
) -> None:
    """Write the model's adapter as two files that PEFT can load. Each file is written atomically.

    `base` is the name of the base on the hub, and `revision` is the revision there. `base_sha256`
    is the hash of the base's weights file, which `load_adapter` can check. The model may be wrapped
    as `inner_model` describes. Raises ValueError for a model without an adapter, for another
    adapter in a part of the model, for a layer that PEFT would misread, and for a tensor that is
    not finite, or on the meta device.
    """
    model = inner_model(model)
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapter to save; `inject` or `load_adapter` adds one")
    owners = [name for name, part in model.named_modules() if "lora_config" in vars(part)]
    if not owners:
        raise ValueError("the adapter belongs to a larger model, of which this is a part; save it")
    if owners != [""]:
        parts = ", ".join(filter(None, owners))
        raise ValueError(f"the adapter belongs to a part of the model: {parts}; save it")
    if any(layer.lora_A.weight.is_meta for layer in layers.values()):
        raise ValueError("the adapter is on the meta device, or offloaded by accelerate; load it")
    misread = misread_by_peft(model, layers)
    if misread:
        raise ValueError(f"the adapter cannot be saved in PEFT's format: {misread}")
    header = {BASE_SHA256: base_sha256, QUANTISED: quantisation(model)}
    write_adapter(
        directory,
        adapter_state_dict(model),
        saved_config(model),
        base_fields(model, base, revision),
        {name: value for name, value in header.items() if value},
    )


def base_fields(model: nn.Module, base: str, revision: str | None = None) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` that describe the base."""
    view = peft_view(model)
    return {
        "task_type": view.task_type,
        "fan_in_fan_out": view.fan_in_fan_out,
        "base_model_name_or_path": base,
        "revision": revision,
    }


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    base: Mapping[str, Any],
    header: Mapping[str, str],
) -> None:
    """Write the two files of an adapter. `tensors` has PEFT's keys.

    `base` is from `base_fields`. The entries of `header` go into the tensor file's header.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as weights, replacing(directory / CONFIG) as fields:
        write_tensors(weights, tensors, {"format": "pt", **header}, torch.float32)
        content = json.dumps(peft_config(config, base), indent=2)
        fields.write_text(content + "\n", encoding="utf-8")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return every layer's A and B, and DoRA's magnitudes, under PEFT's keys, as in the adapter's
    file. The model may be wrapped as for `save_adapter`."""
    model = inner_model(model)
    return tensors_by_key(peft_view(model).prefix, lora_layers(model))


def tensors_by_key(prefix: str, layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """Return the tensors of LoRA layers under PEFT's keys. `prefix` is from `peft_view`."""
    tensors = {}
    for name, layer in layers.items():
        for part, tensor in layer.saved_tensors().items():
            tensors[f"{PREFIX}{prefix}{name}.{part}"] = tensor.detach()
    return tensors


def saved_config(model: nn.Module) -> LoRAConfig:
    """Return the config of the model's adapter file.

    Usually the config is `model.lora_config`. In two cases, the config instead lists each layer's
    PEFT name, rank and alpha. The first case is an adapter that the file stores as plain LoRA:
    PiSSA, or slices such as `c_attn.q`. The second case is a model where PEFT would adapt more than
    we do: "all-linear" includes layers whose forward is bypassed, and in a mixture of experts, PEFT
    could apply a short target such as `down_proj` to the experts too.
    """
    config: LoRAConfig = model.lora_config  # type: ignore[assignment]
    layers = lora_layers(model)
    as_trained = not any(layer.saved_as_plain for layer in layers.values())
    leaves_out = config.target_modules == ALL_LINEAR and unfit_layers(model)
    if as_trained and not leaves_out and not expert_weights(model):
        return config

    prefix = peft_view(model).prefix
    saved = {prefix + name: layer.saved_config() for name, layer in layers.items()}
    first = next(iter(saved.values()))
    return replace(
        first,
        target_modules=_exactly(saved, [prefix + name for name, _ in model.named_modules()]),
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=_pattern({name: own.r for name, own in saved.items()}, first.r),
        alpha_pattern=_pattern(
            {name: own.lora_alpha for name, own in saved.items()}, first.lora_alpha
        ),
    )


def _exactly(saved: Collection[str], names: Iterable[str]) -> tuple[str, ...] | str:
    """Return `target_modules` that match the saved layers, and no other of the model's names."""
    others = set(names) - set(saved)
    if any(other.endswith(f".{name}") for other in others for name in saved):
        return "|".join(map(re.escape, saved))
    return tuple(saved)


def _pattern(values: Mapping[str, Number], usual: Number) -> dict[str, Number]:
    """Return a pattern that gives each layer its value. The value `usual` needs no entry.

    An entry also matches longer names that end in it, and names that have another character in
    the place of a dot. The first match counts, so entries of these names come first.
    """
    unusual = [name for name, value in values.items() if value != usual]
    matched = {name for key in unusual for name in values if pattern_matches(key, name)}
    first = sorted(matched, key=lambda name: (-len(name), name.count(".")))
    return {name: values[name] for name in first}
