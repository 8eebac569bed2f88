"""Read adapters in PEFT's format, strictly: what does not fit is refused by name."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora.inject import install, new_layers
from lora.layer import LoRAConfig
from lora.peft_config import BAD_PATTERN, CONFIG, brief, parse_config
from lora.peft_view import peft_view
from lora.save import BASE_SHA256, WEIGHTS, tensors_by_key
from lora.tensors import DTYPES, is_finite

PICKLED_WEIGHTS = "adapter_model.bin"  # written by PEFT before 0.7


def load_adapter(
    model: nn.Module, directory: str | Path, base_sha256: str | None = None
) -> LoRAConfig:
    """Inject the adapter in `directory` into `model`, A and B as stored. Return its config.

    Raises ValueError if the file records another base than `base_sha256`, and if a tensor is
    missing, unexpected, misshapen or not finite. The model is then unchanged.
    """
    directory = Path(directory)
    config = load_adapter_config(directory)
    if base_sha256:
        _refuse_another_base(directory, base_sha256)
    try:
        layers = new_layers(model, config)
    except (ValueError, *BAD_PATTERN) as error:  # PEFT's targets may be regular expressions
        path = directory / CONFIG
        raise ValueError(f"{path}: does not fit this model: {error!s:.150}") from error

    parameters = tensors_by_key(peft_view(model).prefix, layers)
    path = adapter_path(directory)
    tensors = _read_tensors(path)
    _check_tensors(path, tensors, parameters)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    install(model, config, layers)
    return config


def load_adapter_config(directory: str | Path) -> LoRAConfig:
    """Read the adapter's hyper-parameters.

    Raises ValueError, naming the field, for anything but LoRA and DoRA on linear layers.
    """
    stored = _read_config(Path(directory))
    try:
        return parse_config(stored)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / CONFIG}: {error}") from error


def stored_base_fields(directory: str | Path) -> dict[str, Any]:
    """Return the fields of the adapter's config that describe its base, as `base_fields` does."""
    stored = _read_config(Path(directory))
    return {
        "task_type": stored.get("task_type"),
        "fan_in_fan_out": stored.get("fan_in_fan_out", False),
        "base_model_name_or_path": stored.get("base_model_name_or_path"),
        "revision": stored.get("revision"),
    }


def read_header(directory: str | Path) -> dict[str, str]:
    """Return what the header of the adapter's file records of its base. A pickle has no header."""
    path = adapter_path(directory)
    if path.name == PICKLED_WEIGHTS:
        return {}
    with _readable(path), safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    return {name: value for name, value in header.items() if name != "format"}


def adapter_path(directory: str | Path) -> Path:
    """Return the file of A and B: safetensors, unless there is only PEFT's older pickle."""
    path = Path(directory) / WEIGHTS
    pickled = Path(directory) / PICKLED_WEIGHTS
    if pickled.exists() and not path.exists():
        return pickled
    return path


def _refuse_another_base(directory: Path, base_sha256: str) -> None:
    recorded = read_header(directory).get(BASE_SHA256)
    if recorded not in (None, base_sha256):
        name = stored_base_fields(directory)["base_model_name_or_path"]
        raise ValueError(
            f"{adapter_path(directory)}: was trained on another base (weights sha256 "
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
        raise ValueError(f"{path}: holds a JSON {type(stored).__name__}, not an object")
    return stored


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors by name. Raises ValueError for a damaged file, and for a pickle of
    anything but plain data, which could run code.
    """
    with _readable(path):
        if path.name == PICKLED_WEIGHTS:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            return {str(key): value for key, value in loaded.items()}
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises into a ValueError that names the file."""
    try:
        open(path, "rb").close()
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # each reader has its own
        kind = type(error).__name__
        raise ValueError(f"{path}: damaged, or not a file of plain tensors ({kind})") from error


def _check_tensors(
    path: Path, tensors: Mapping[str, object], parameters: Mapping[str, Tensor]
) -> None:
    """Raise ValueError, naming a tensor, unless these are the parameters' names and shapes, and all
    numbers are finite.
    """
    missing = sorted(parameters.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); "
            "the file is of another model"
        )
    extra = sorted(tensors.keys() - parameters.keys())
    if extra:
        raise ValueError(
            f"{path}: unexpected tensor {extra[0]!r:.120}; the file is of another model"
        )
    for key, parameter in parameters.items():
        value = tensors[key]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{path}: {key} is not a dense tensor")
        if value.dtype not in DTYPES:
            raise ValueError(f"{path}: {key} is in {value.dtype}, not in fp32, fp16 or bf16")
        if value.shape != parameter.shape:
            needed = tuple(parameter.shape)
            raise ValueError(f"{path}: {key} is {tuple(value.shape)} where {needed} is needed")
        if not is_finite(value):
            raise ValueError(f"{path}: {key} holds numbers that are not finite; it is damaged")
