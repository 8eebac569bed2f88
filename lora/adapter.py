"""Adapter files in PEFT's format, read and written strictly."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from errors import UserError
from files import atomic_path, read_json, write_json
from lora.config import LoRAConfig
from lora.inject import inject, lora_layers
from model.hub import HUB_NAMES, OWNER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.transformer."
# PEFT's fields that change the result and are not computed here, with the values that do not.
UNSUPPORTED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every A and B under the key that PEFT gives it."""
    return {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


def save_adapter(model: nn.Module, config: LoRAConfig, directory: Path, base: str) -> None:
    """Write the model's adapter as stock PEFT reads it, each of the two files atomically."""
    tensors = {key: weight.detach().cpu().contiguous()
               for key, weight in adapter_tensors(model).items()}
    write_json(Path(directory) / CONFIG, _peft_config(config, base))
    with atomic_path(Path(directory) / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _peft_config(config: LoRAConfig, base: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "fan_in_fan_out": True,  # stock GPT-2 holds Conv1D weights, (in, out)
        "bias": "none",
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "inference_mode": True,
    }


def load_adapter_config(directory: Path) -> LoRAConfig:
    """The adapter's hyper-parameters.

    Raises UserError that names the field for anything that is not plain LoRA on linear layers.
    """
    path = Path(directory) / CONFIG
    stored = read_json(path)
    if "peft_type" not in stored:
        raise UserError(f"{path}: peft_type is missing; not an adapter")
    for field, harmless in UNSUPPORTED.items():
        if field in stored and stored[field] not in harmless:
            raise UserError(f"{path}: {field} {stored[field]!r} is not supported")
    targets = stored.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise UserError(f"{path}: target_modules is not a list of module names")
    return LoRAConfig(
        r=_number(path, stored, "r", int, 1, 1 << 20),
        lora_alpha=_number(path, stored, "lora_alpha", (int, float), 0, 1e6),
        lora_dropout=_number(path, stored | {"lora_dropout": stored.get("lora_dropout", 0.0)},
                             "lora_dropout", (int, float), 0, 0.999999),
        target_modules=tuple(targets),
        use_rslora=stored.get("use_rslora", False) is True,
    )


def adapter_base(directory: Path) -> str | None:
    """The base that the adapter names, if it is one that `--base` knows by name.

    A path in a file from elsewhere is not followed.
    """
    name = read_json(Path(directory) / CONFIG).get("base_model_name_or_path")
    name = name.removeprefix(f"{OWNER}/") if isinstance(name, str) else None
    return name if name in (*HUB_NAMES, "mini") else None


def _number(path: Path, stored: dict, field: str, kind, low: float, high: float):
    value = stored.get(field)
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{path}: {field} {value!r} is not a number from {low} to {high:,}")
    return value


def load_adapter(model: nn.Module, directory: Path) -> LoRAConfig:
    """Inject the adapter in `directory` into `model`, A and B as stored; return its config.

    Raises UserError that names the tensor when one is missing, left over, misshapen or not
    finite: an adapter of another base never loads in part.
    """
    config = load_adapter_config(directory)
    path = Path(directory) / WEIGHTS
    try:
        inject(model, config)
    except ValueError as error:
        raise UserError(f"{path.parent}: does not fit this base: {error}") from error
    stored = _read_tensors(path)
    wanted = adapter_tensors(model)
    if missing := sorted(wanted.keys() - stored.keys()):
        raise UserError(f"{path}: tensor {missing[0]} is missing; the adapter is for another base")
    if extra := sorted(stored.keys() - wanted.keys()):
        raise UserError(f"{path}: unexpected tensor {extra[0]}; the adapter is for another base")
    with torch.no_grad():
        for key, weight in wanted.items():
            weight.copy_(_checked(path, key, stored[key], weight.shape))
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: missing, damaged or not a safetensors file ({error})") from error


def _checked(path: Path, key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise UserError(f"{path}: {key} is {tuple(tensor.shape)}, this base needs {tuple(shape)}")
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise UserError(f"{path}: {key} does not hold finite floating-point numbers")
    return tensor
