"""Compose PEFT's `adapter_config.json`, and read it strictly."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from lora.config import LoRAConfig

CONFIG = "adapter_config.json"
SLICE = re.compile(r"(.*\.)?c_attn\.[qkv]")  # slices such as c_attn.q, which PEFT lacks
READ = {field.name for field in fields(LoRAConfig)}
# Values of fields that a file lacks. `LoRAConfig` refuses None, so these fields are required.
ABSENT = {"peft_type": None, "r": None, "lora_alpha": None, "target_modules": None}
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
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", None),
    "bias": ("none", "lora_only"),  # PEFT's first versions wrote "lora_only", but saved no bias
    "fan_in_fan_out": (True, False),  # does not change how A and B are stored
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA are not supported, because PEFT changes W before it
    # trains such an adapter. The adapter fits only the changed W.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
UNUSED: tuple[Any, ...] = (None, False, [], {})  # the supported values of any other field


def peft_config(config: LoRAConfig, base_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `adapter_config.json`. `base_fields` is from `lora.save.base_fields`.

    The field `peft_version` is left out, because versions of PEFT before 0.18 warn about
    `peft_version`. Later versions fill in the missing field.
    """
    return {
        "peft_type": "LORA",
        **base_fields,
        **asdict(config),  # of a saved adapter, so init_lora_weights is True
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def parse_config(stored: Mapping[str, Any]) -> LoRAConfig:
    """Return the hyper-parameters that `adapter_config.json` contains.

    Raises ValueError, naming the field, unless the adapter is LoRA or DoRA on linear layers.
    """
    stored = ABSENT | {"lora_dropout": 0.0} | dict(stored)
    for field, value in stored.items():
        free = field in READ | IGNORED and field not in SUPPORTED
        if not free and value not in SUPPORTED.get(field, UNUSED):
            raise ValueError(f"{brief(field)} {brief(value)} is not supported")

    known: dict[str, Any] = {field: stored[field] for field in READ & stored.keys()}
    known["init_lora_weights"] = True  # whatever A and B started from, they are trained
    for field in ("rank_pattern", "alpha_pattern"):
        known[field] = stored.get(field) or {}
    config = LoRAConfig(**known)

    targets = config.target_modules
    names = (targets,) if isinstance(targets, str) else targets
    if any(map(SLICE.fullmatch, names)):
        raise ValueError(f"target_modules {brief(names)} does not name whole modules")
    return config


def brief(value: object) -> str:
    """Return a value from a file as one short printable line, for a message."""
    return reprlib.repr(value)[:120]
