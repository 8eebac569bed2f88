"""Adapter files in PEFT's format, read and written strictly."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_path, brief, read_json, write_json
from common.tensors import read_metadata, read_tensors, write_tensors
from lora.inject import inject, lora_layers
from lora.layer import LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.transformer."
BASE_SHA256 = "base_sha256"  # in the header of WEIGHTS: the base's weights file; PEFT ignores it
USED = {"r", "lora_alpha", "lora_dropout", "target_modules"}
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
    "bias": ("none",),
    "use_rslora": (True, False),
    "fan_in_fan_out": (True, False),  # how the base stores W; A and B are stored alike in both
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the first A and B out of W: another base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
UNUSED = (None, False, [], {})  # the values that switch any other field of PEFT's off


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every A and B under the key that PEFT gives it."""
    return {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


def save_adapter(model: nn.Module, config: LoRAConfig, directory: Path, base: str,
                 base_sha256: str = "") -> None:
    """Write the model's adapter as stock PEFT reads it, each of the two files atomically.

    `base` names the base for people; `base_sha256`, of its weights file, decides whether it fits.
    """
    metadata = {"format": "pt"} | ({BASE_SHA256: base_sha256} if base_sha256 else {})
    write_json(Path(directory) / CONFIG, _peft_config(config, base))
    with atomic_path(Path(directory) / WEIGHTS) as temporary:
        write_tensors(temporary, adapter_tensors(model), metadata, torch.float32)


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
    """Read the adapter's hyper-parameters.

    Raises UserError that names the field for anything that is not plain LoRA on linear layers.
    """
    path = Path(directory) / CONFIG
    stored = {"peft_type": None, "lora_dropout": 0.0} | read_json(path)
    for field, value in stored.items():
        if field not in USED | IGNORED and value not in SUPPORTED.get(field, UNUSED):
            raise UserError(f"{path}: {brief(field)} {brief(value)} is not supported")
    targets = stored.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise UserError(f"{path}: target_modules {brief(targets)} is not a list of module names")
    return LoRAConfig(
        r=_number(path, stored, "r", int, 1, 1 << 20),
        lora_alpha=_number(path, stored, "lora_alpha", int | float, 0, 1e6),
        lora_dropout=_number(path, stored, "lora_dropout", int | float, 0, 1),
        target_modules=tuple(dict.fromkeys(targets)),
        use_rslora=bool(stored.get("use_rslora")),
    )


def _number(path: Path, stored: dict, field: str, kind, low: float, high: float):
    value = stored.get(field)
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{path}: {field} {brief(value)} is not {what} from {low} to {high:,.0f}")
    return value


def base_name(directory: Path) -> object:
    """The base that the adapter's config names: for people, since a path may mean another model."""
    return read_json(Path(directory) / CONFIG).get("base_model_name_or_path")


def check_base(directory: Path, base_sha256: str) -> None:
    """Raise UserError if the adapter's file says that it was trained on another base."""
    path = Path(directory) / WEIGHTS
    needed = read_metadata(path).get(BASE_SHA256, base_sha256)
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
    except ValueError as error:
        raise UserError(f"{Path(directory) / CONFIG}: does not fit this base: "
                        f"{error!s:.150}") from error
    wanted = adapter_tensors(model)
    shapes = {key: weight.shape for key, weight in wanted.items()}
    tensors = dict(read_tensors(Path(directory) / WEIGHTS, shapes))  # all checked before any is set
    with torch.no_grad():
        for key, tensor in tensors.items():
            wanted[key].copy_(tensor)
    return config
