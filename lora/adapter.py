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
from untrusted import brief, check_safetensors_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.transformer."
READ = {"r", "lora_alpha", "lora_dropout", "target_modules"}
# PEFT's fields that do not change what a trained adapter computes, whatever they say.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}
# Fields that may change it, and the values that are plain LoRA.
PLAIN = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "use_rslora": (True, False),
    "fan_in_fan_out": (True, False),  # how the base stores W; A and B are stored alike in both
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the first A and B out of W: another base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
OFF = (None, False, [], {})  # the value of PEFT's other switches, later ones included, when unused


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every A and B under the key that PEFT gives it."""
    return {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


def save_adapter(model: nn.Module, config: LoRAConfig, directory: Path, base: str) -> None:
    """Write the model's adapter as stock PEFT reads it, each of the two files atomically."""
    tensors = {key: weight.detach().float().cpu().contiguous()
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
    stored = {"peft_type": None, "lora_dropout": 0.0} | read_json(path)
    for field, value in stored.items():
        if field not in READ | IGNORED and value not in PLAIN.get(field, OFF):
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
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{path}: {field} {brief(value)} is not {what} from {low} to {high:,.0f}")
    return value


def load_adapter(model: nn.Module, directory: Path) -> LoRAConfig:
    """Inject the adapter in `directory` into `model`, A and B as stored; return its config.

    Raises UserError that names the tensor when one is missing, left over, misshapen or not
    finite: an adapter of another base never loads in part.
    """
    config = load_adapter_config(directory)
    try:
        inject(model, config)
    except ValueError as error:
        raise UserError(f"{Path(directory) / CONFIG}: does not fit this base: "
                        f"{error!s:.150}") from error
    wanted = adapter_tensors(model)
    stored = _read_tensors(Path(directory) / WEIGHTS, {k: w.shape for k, w in wanted.items()})
    with torch.no_grad():
        for key, weight in wanted.items():
            weight.copy_(stored[key])
    return config


def _read_tensors(path: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of `shapes`, if the file holds them and no others."""
    check_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if missing := sorted(shapes.keys() - keys):
                raise UserError(f"{path}: tensor {missing[0]} is missing; the adapter is for "
                                "another base")
            if extra := sorted(keys - shapes.keys()):
                raise UserError(f"{path}: unexpected tensor {extra[0]!r:.120}; the adapter is "
                                "for another base")
            return {key: _read_tensor(path, file, key, shape) for key, shape in shapes.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: missing, truncated or not a safetensors file") from error


def _read_tensor(path: Path, file: safe_open, key: str, shape: torch.Size) -> Tensor:
    header = file.get_slice(key)
    if header.get_shape() != list(shape):
        raise UserError(f"{path}: {key} is {brief(tuple(header.get_shape()))}, this base "
                        f"needs {tuple(shape)}")
    if header.get_dtype() not in ("F32", "F16", "BF16"):
        raise UserError(f"{path}: {key} holds {header.get_dtype()}; only F32, F16 and BF16 are "
                        "known")
    tensor = file.get_tensor(key)
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: {key} holds numbers that are not finite; the file is damaged")
    return tensor
