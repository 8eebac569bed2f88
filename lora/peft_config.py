"""Compose PEFT's `adapter_config.json`, and read it strictly."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lora.layer import LoRAConfig
from lora.variants import config_fields, make_config

CONFIG = "adapter_config.json"
SLICE = re.compile(r"(.*\.)?c_attn\.[qkv]")  # slices such as c_attn.q, which PEFT lacks
READ = {field.name for field in fields(LoRAConfig)} | {"use_dora"}
# PEFT's fields that do not change what a trained adapter computes.
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Fields that may change the result, and their supported values.
SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", None),
    "bias": ("none", "lora_only"),  # PEFT's first versions wrote "lora_only", but saved no bias
    "use_rslora": (True, False),
    "fan_in_fan_out": (True, False),  # does not change how A and B are stored
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA are not supported, because PEFT changes W before it
    # trains such an adapter. The adapter fits only the changed W.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
UNUSED: tuple = (None, False, [], {})  # the supported values of any other field
RANKS = (1, 1 << 20)  # minimum and maximum
ALPHAS = (0, 3e6)


def peft_config(config: LoRAConfig, base_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `adapter_config.json`. `base_fields` is from `lora.save.base_fields`.

    The field `peft_version` is left out, because versions of PEFT before 0.18 warn about
    `peft_version`. Later versions fill in the missing field.
    """
    return {
        "peft_type": "LORA",
        **base_fields,
        **config_fields(config),
        "init_lora_weights": True,  # so that PEFT loads A and B unchanged
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def parse_config(stored: Mapping[str, Any]) -> LoRAConfig:
    """Return the hyper-parameters that `adapter_config.json` contains.

    Raises ValueError, naming the field, unless the adapter is LoRA or DoRA on linear layers.
    """
    stored = {"peft_type": None, "lora_dropout": 0.0} | dict(stored)
    for field, value in stored.items():
        free = field in READ | IGNORED and field not in SUPPORTED
        if not free and value not in SUPPORTED.get(field, UNUSED):
            raise ValueError(f"{brief(field)} {brief(value)} is not supported")

    return make_config(
        use_dora=stored.get("use_dora", False),
        r=_number("r", stored.get("r"), int, *RANKS),
        lora_alpha=_number("lora_alpha", stored.get("lora_alpha"), int | float, *ALPHAS),
        lora_dropout=_number("lora_dropout", stored["lora_dropout"], int | float, 0, 1),
        target_modules=_targets(stored),
        use_rslora=stored.get("use_rslora", False),
        layers_to_transform=_items(stored, "layers_to_transform", int),
        layers_pattern=_items(stored, "layers_pattern", str),
        rank_pattern=_pattern(stored, "rank_pattern", int, *RANKS),
        alpha_pattern=_pattern(stored, "alpha_pattern", int | float, *ALPHAS),
    )


def _number(field: str, value: Any, kind: Any, low: float, high: float) -> Any:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{field} {brief(value)} is not {what} from {low} to {high:,.0f}")
    return value


def _items(stored: Mapping[str, Any], field: str, kind: type) -> tuple | None:
    """Return the values of a field as a tuple, or None if the field is empty. A field has one value
    or a list of values."""
    value = stored.get(field)
    if value in (None, "", []):
        return None
    items = value if isinstance(value, list) else [value]
    if any(type(item) is not kind for item in items):
        raise ValueError(f"{field} {brief(value)} is not a list of {kind.__name__}")
    return tuple(dict.fromkeys(items))


def _targets(stored: Mapping[str, Any]) -> tuple[str, ...] | str:
    """Return the names of the target modules, or a single regular expression."""
    names = _items(stored, "target_modules", str)
    if names is None or any(map(SLICE.fullmatch, names)):
        raise ValueError(
            f"target_modules {brief(stored.get('target_modules'))} does not name whole modules"
        )
    return names[0] if isinstance(stored["target_modules"], str) else names


def _pattern(stored: Mapping[str, Any], field: str, kind: Any, low: float, high: float) -> dict:
    """Return the dict in a field. It maps regular expressions to numbers."""
    pattern = stored.get(field) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{field} {brief(pattern)} is not an object of names and numbers")
    for key, value in pattern.items():
        _number(f"{field} {brief(key)}", value, kind, low, high)
    return pattern


def brief(value: object) -> str:
    """Return a value from a file as one short printable line, for a message."""
    return reprlib.repr(value)[:120]
