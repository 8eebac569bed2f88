"""Read adapters in PEFT's format strictly. An error names the field or tensor that is wrong."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lora.config import LoRAConfig
from lora.inject import install, new_layers
from lora.peft_config import CONFIG, brief, parse_config
from lora.peft_view import peft_view
from lora.save import BASE_SHA256, PREFIX, WEIGHTS, tensors_by_key
from lora.tensors import check_names, checked, read_metadata, readable


def load_adapter(
    model: nn.Module, directory: str | Path, base_sha256: str | None = None
) -> LoRAConfig:
    """Inject the adapter in `directory` into `model`. Return the config of the adapter.

    Raises ValueError if the tensor file records a hash of the base that differs from `base_sha256`.
    Also raises ValueError if a tensor is missing, unexpected, not finite or of the wrong shape, and
    for a model on the meta device.
    After an error, the model is unchanged. With an adapter of the head, PEFT also stores the head's
    W. This W must equal the model's W.
    """
    directory = Path(directory)
    config = load_adapter_config(directory)
    if base_sha256:
        _refuse_another_base(directory, base_sha256)
    try:
        layers = new_layers(model, config)
    except ValueError as error:
        path = directory / CONFIG
        raise ValueError(f"{path}: does not fit this model: {error!s:.150}") from error

    if any(layer.lora_A.weight.is_meta for layer in layers.values()):  # torch would ignore a copy
        raise ValueError("the model is on the meta device; load its weights before the adapter")
    prefix = peft_view(model).prefix
    parameters = tensors_by_key(prefix, layers)
    originals = {f"{PREFIX}{prefix}{name}.base_layer.weight": name for name in layers}
    path = directory / WEIGHTS
    with torch.no_grad(), readable(path), safe_open(path, framework="pt") as file:
        copies = originals.keys() & file.keys()
        check_names(path, set(file.keys()) - copies, parameters)
        for key in copies:
            weight = layers[originals[key]].base_layer.weight
            if not torch.equal(file.get_tensor(key).to(weight), weight):
                raise ValueError(f"{path}: {key} differs from the model's; use the adapter's base")
        for key, parameter in parameters.items():
            parameter.copy_(checked(file.get_tensor(key), parameter.shape, f"{path}: {key}"))
    install(model, config, layers)
    return config


def load_adapter_config(directory: str | Path) -> LoRAConfig:
    """Read the adapter's hyper-parameters.

    Raises ValueError, naming the field, unless the adapter is LoRA or DoRA on linear layers.
    """
    stored = _read_config(Path(directory))
    try:
        return parse_config(stored)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / CONFIG}: {error}") from error


def stored_base_name(directory: str | Path) -> Any:
    """Return the name of the base in the adapter's config. A revision follows the name after @."""
    stored = _read_config(Path(directory))
    name = stored.get("base_model_name_or_path")
    revision = stored.get("revision")
    return f"{name}@{revision}" if name and revision else name


def read_header(directory: str | Path) -> dict[str, str]:
    """Read the header of the adapter's tensor file, and return the fields that describe the
    base."""
    header = read_metadata(Path(directory) / WEIGHTS)
    return {name: value for name, value in header.items() if name != "format"}


def _refuse_another_base(directory: Path, base_sha256: str) -> None:
    recorded = read_header(directory).get(BASE_SHA256)
    if recorded not in (None, base_sha256):
        name = stored_base_name(directory)
        raise ValueError(
            f"{directory / WEIGHTS}: was trained on another base (weights sha256 "
            f"{brief(recorded)}, not {brief(base_sha256)}); use that base, {brief(name)}"
        )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not os.path.isdir(directory):
        raise ValueError(f"{directory}: no such directory; name an adapter")
    if not os.path.exists(path):
        if os.path.exists(directory / "config.json"):
            raise ValueError(f"{directory}: is a whole model, not an adapter; load it as the base")
        raise ValueError(f"{directory}: contains no {CONFIG}; name an adapter")
    try:
        stored = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: contains a JSON {type(stored).__name__}, not an object")
    return stored
