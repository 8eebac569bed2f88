"""Read and write adapters in PEFT's format, strictly."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_path, brief, write_json
from lora.inject import inject, lora_layers
from lora.layer import LoRAConfig
from lora.peft_config import (
    BAD_PATTERN,
    CONFIG,
    base_name,
    load_adapter_config,
    model_fields,
    peft_config,
)
from lora.quantised import quantisation
from lora.targets import full_name, layer_config
from lora.variants import make_layer
from storage.tensors import read_metadata, read_tensors, write_tensors

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"  # written by PEFT before 0.7
PREFIX = "base_model.model."
BASE_SHA256 = "base_sha256"  # in the header of WEIGHTS: of the base's weights file; PEFT ignores it
QUANTISED = "base_quantised"  # there, too: "nf4" or "int8", if the base was while training


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every layer's A and B, and DoRA's vector, under the key that PEFT gives it."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        for part, tensor in layer.saved_tensors().items():
            tensors[f"{PREFIX}{full_name(model, name)}.{part}"] = tensor
    return tensors


def save_adapter(
    model: nn.Module, config: LoRAConfig, directory: Path, base: str, base_sha256: str = ""
) -> None:
    """Write the model's adapter as stock PEFT reads it, each of the two files atomically.

    `base`, the base's name, is informational; a reader compares `base_sha256`, of its weights
    file. Raises ValueError for a model without an adapter.
    """
    model = getattr(model, "_orig_mod", model)  # `torch.compile` would add this to each name
    if not lora_layers(model):
        raise ValueError("the model has no adapter to save")
    quantised = quantisation(model)
    config = saved_config(model, config)
    fields = model_fields(model)
    tensors = adapter_tensors(model)
    write_adapter(tensors, config, fields, directory, base, base_sha256, quantised)


def write_adapter(
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    fields: Mapping[str, Any],
    directory: Path,
    base: str,
    base_sha256: str = "",
    quantised: str | None = None,
) -> None:
    """Write `tensors`, every A and B under its PEFT key, `config` and `model_fields`.

    `quantised` says how the base was, while these were trained.
    """
    directory = Path(directory)
    metadata = {"format": "pt"}
    if base_sha256:
        metadata[BASE_SHA256] = base_sha256
    if quantised:
        metadata[QUANTISED] = quantised
    with atomic_path(directory / WEIGHTS) as temporary:
        write_tensors(temporary, tensors, metadata, torch.float32)
        write_json(directory / CONFIG, peft_config(config, fields, base))


def saved_config(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Return the config with which the model's adapter file is to be read.

    That is `config`, unless a layer saves other tensors than those it trains, as PiSSA and slices
    do: then each layer stands in the config by its full name, rank and alpha.
    """
    layers = lora_layers(model)
    saved = {full_name(model, name): layer.saved_config() for name, layer in layers.items()}
    if all(own == layer_config(config, name) for name, own in saved.items()):
        return config

    first = next(iter(saved.values()))
    rank_pattern = {}
    alpha_pattern = {}
    for name, own in saved.items():
        if own.r != first.r:
            rank_pattern[name] = own.r
        if own.lora_alpha != first.lora_alpha:
            alpha_pattern[name] = own.lora_alpha
    return replace(
        first,
        target_modules=tuple(saved),
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


def adapter_path(directory: Path) -> Path:
    """Return the file of A and B: safetensors, unless there is only PEFT's older pickle."""
    path = Path(directory) / WEIGHTS
    pickled = Path(directory) / PICKLED_WEIGHTS
    if pickled.exists() and not path.exists():
        return pickled
    return path


def read_header(directory: Path) -> dict[str, str]:
    """Return what the header of the adapter's file says; a pickle has none."""
    path = adapter_path(directory)
    if path.name == PICKLED_WEIGHTS:
        return {}
    return read_metadata(path)


def base_hash(directory: Path) -> str | None:
    """Return the hash of the base's weights in the adapter's header, or None."""
    return read_header(directory).get(BASE_SHA256)


def load_adapter(model: nn.Module, directory: Path, base_sha256: str | None = None) -> LoRAConfig:
    """Inject the adapter in `directory` into `model`, A and B as stored; return its config.

    Raises UserError if the file names another base than `base_sha256`, and if a tensor is missing,
    unexpected, misshapen or not finite; the error names the tensor. Either all tensors are loaded
    or none.
    """
    config = load_adapter_config(directory)
    if base_sha256:
        _refuse_another_base(directory, base_sha256)
    try:
        inject(model, config, make_layer)
    except (ValueError, *BAD_PATTERN) as error:  # PEFT's targets may be regular expressions
        raise UserError(
            f"{Path(directory) / CONFIG}: does not fit this base: {error!s:.150}"
        ) from error

    wanted = adapter_tensors(model)
    shapes = {key: weight.shape for key, weight in wanted.items()}
    try:
        tensors = dict(read_tensors(adapter_path(directory), shapes))  # all, before any is set
    except UserError:
        for name, layer in lora_layers(model).items():
            model.set_submodule(name, layer.base_layer)
        raise
    with torch.no_grad():
        for key, tensor in tensors.items():
            wanted[key].copy_(tensor)
    return config


def _refuse_another_base(directory: Path, base_sha256: str) -> None:
    """Raise UserError if the adapter's header names another base."""
    needed = base_hash(directory)
    if needed not in (None, base_sha256):
        raise UserError(
            f"{adapter_path(directory)}: was trained on another base (weights sha256 "
            f"{brief(needed)}, not {brief(base_sha256)}); give --base the one it was trained on, "
            f"{brief(base_name(directory))}"
        )
