"""Adapter files in PEFT's format, read and written strictly."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_path, brief, read_json, write_json
from common.tensors import read_metadata, read_tensors, write_tensors
from lora.inject import inject, lora_layers
from lora.layer import LoRAConfig
from lora.slices import SLICES
from lora.targets import PREFIX as TRANSFORMER
from lora.targets import layer_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"  # of PEFT before 0.6
PREFIX = f"base_model.model.{TRANSFORMER}"
BASE_SHA256 = "base_sha256"  # in the header of WEIGHTS: the base's weights file; PEFT ignores it
BLOCKS = "layers_to_transform"
USED = {"r", "lora_alpha", "lora_dropout", "target_modules", BLOCKS, "rank_pattern",
        "alpha_pattern"}
# PEFT's fields that do not change what a trained adapter computes, whatever they say.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}
# Fields that may change it, and the values that are plain LoRA.
SUPPORTED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", "lora_only"),  # the tensors decide: PEFT long wrote "lora_only" without any
    "use_rslora": (True, False),
    "use_dora": (True, False),
    "fan_in_fan_out": (True, False),  # how the base stores W; A and B are stored alike in both
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the first A and B out of W: another base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
RANKS, ALPHAS = (1, 1 << 20), (0, 1e6)  # the least and the largest
UNUSED = (None, False, [], {})  # the values that switch any other field of PEFT's off


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every layer's A and B, and DoRA's vector, under the key that PEFT gives it."""
    return {f"{PREFIX}{name}.{part}": tensor for name, layer in lora_layers(model).items()
            for part, tensor in layer.adapter().items()}


def save_adapter(model: nn.Module, config: LoRAConfig, directory: Path, base: str,
                 base_sha256: str = "") -> None:
    """Write the model's adapter as stock PEFT reads it, each of the two files atomically.

    `base` names the base for people; `base_sha256`, of its weights file, decides whether it fits.
    """
    write_adapter(adapter_tensors(model), _plain_config(model, config), directory, base,
                  base_sha256)


def write_adapter(tensors: Mapping[str, Tensor], config: LoRAConfig, directory: Path, base: str,
                  base_sha256: str = "") -> None:
    """Do what `save_adapter` does, with every A and B under its key."""
    metadata = {"format": "pt"} | ({BASE_SHA256: base_sha256} if base_sha256 else {})
    write_json(Path(directory) / CONFIG, _peft_config(config, base))
    with atomic_path(Path(directory) / WEIGHTS) as temporary:
        write_tensors(temporary, tensors, metadata, torch.float32)


def _plain_config(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Return `config`, or what PiSSA and slices are as plain LoRA: every layer by its name."""
    layers = {name: layer.config for name, layer in lora_layers(model).items()}
    if all(layer == layer_config(config, name) for name, layer in layers.items()):
        return config
    layers = {TRANSFORMER + name: layer for name, layer in layers.items()}
    first = next(iter(layers.values()))
    return replace(
        first, target_modules=tuple(layers), layers_to_transform=None,
        rank_pattern={n: c.r for n, c in layers.items() if c.r != first.r},
        alpha_pattern={n: c.lora_alpha for n, c in layers.items()
                       if c.lora_alpha != first.lora_alpha})


def _peft_config(config: LoRAConfig, base: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **asdict(config),
        "init_lora_weights": True,  # a reader takes A and B as they are
        "fan_in_fan_out": True,  # stock GPT-2 holds Conv1D weights, (in, out)
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def load_adapter_config(directory: Path) -> LoRAConfig:
    """Read the adapter's hyper-parameters.

    Raises UserError that names the field for anything but LoRA and DoRA on linear layers.
    """
    path = Path(directory) / CONFIG
    stored = {"peft_type": None, "lora_dropout": 0.0} | read_json(path)
    for field, value in stored.items():
        if field not in USED | IGNORED and value not in SUPPORTED.get(field, UNUSED):
            raise UserError(f"{path}: {brief(field)} {brief(value)} is not supported")
    targets, blocks = stored.get("target_modules"), stored.get(BLOCKS)
    names = [targets] if isinstance(targets, str) else targets
    if not targets or not isinstance(names, list) or not all(
            isinstance(name, str) and name.rpartition(".")[2] not in SLICES for name in names):
        raise UserError(f"{path}: target_modules {brief(targets)} is not a list of module names, "
                        "nor a regular expression")
    blocks = blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]
    return LoRAConfig(
        r=_number(path, stored, "r", int, *RANKS),
        lora_alpha=_number(path, stored, "lora_alpha", int | float, *ALPHAS),
        lora_dropout=_number(path, stored, "lora_dropout", int | float, 0, 1),
        target_modules=targets if isinstance(targets, str) else tuple(dict.fromkeys(targets)),
        use_rslora=bool(stored.get("use_rslora")),
        layers_to_transform=tuple(_number(path, {BLOCKS: block}, BLOCKS, int, 0, 1 << 20)
                                  for block in blocks) or None,
        rank_pattern=_pattern(path, stored, "rank_pattern", int, *RANKS),
        alpha_pattern=_pattern(path, stored, "alpha_pattern", int | float, *ALPHAS),
        use_dora=bool(stored.get("use_dora")),
    )


def _pattern(path: Path, stored: dict, field: str, *limits) -> dict:
    pattern = stored.get(field) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {field} {brief(pattern)} is not an object of names and numbers")
    for key, value in pattern.items():
        name = f"{field} {brief(key)}"
        _number(path, {name: value}, name, *limits)
    return pattern


def _number(path: Path, stored: dict, field: str, kind, low: float, high: float):
    value = stored.get(field)
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{path}: {field} {brief(value)} is not {what} from {low} to {high:,.0f}")
    return value


def base_name(directory: Path) -> object:
    """The base that the adapter's config names: for people, since a path may mean another model."""
    return read_json(Path(directory) / CONFIG).get("base_model_name_or_path")


def _weights_path(directory: Path) -> Path:
    path, pickled = (Path(directory) / name for name in (WEIGHTS, PICKLED_WEIGHTS))
    return pickled if os.path.exists(pickled) and not os.path.exists(path) else path


def check_base(directory: Path, base_sha256: str) -> None:
    """Raise UserError if the adapter's file says that it was trained on another base."""
    path = _weights_path(directory)
    header = read_metadata(path) if path.name == WEIGHTS else {}
    needed = header.get(BASE_SHA256, base_sha256)
    if needed != base_sha256:
        raise UserError(f"{path}: was trained on another base (weights sha256 {brief(needed)}, "
                        f"not {brief(base_sha256)}); give --base the one it was trained on, "
                        f"{brief(base_name(directory))}")


def load_adapter(model: nn.Module, directory: Path) -> LoRAConfig:
    """Inject the adapter in `directory` into `model`, A and B as stored; return its config.

    Raises UserError that names the tensor if one is missing, unexpected, misshapen or not finite:
    an adapter of another base never loads in part.
    """
    config = load_adapter_config(directory)
    try:
        inject(model, config)
    except (ValueError, re.error) as error:  # PEFT's targets may be regular expressions
        raise UserError(f"{Path(directory) / CONFIG}: does not fit this base: "
                        f"{error!s:.150}") from error
    wanted = adapter_tensors(model)
    shapes = {key: weight.shape for key, weight in wanted.items()}
    tensors = dict(read_tensors(_weights_path(directory), shapes))  # all checked before any is set
    with torch.no_grad():
        for key, tensor in tensors.items():
            wanted[key].copy_(tensor)
    return config
