"""Read adapter_config.json, PEFT's file of hyper-parameters, strictly; compose our own."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common.errors import UserError
from common.files import brief, check_number, read_json
from lora.layer import LoRAConfig
from lora.variants import config_fields, make_config
from storage.hf_compat import stock_name
from storage.hub import split_revision

CONFIG = "adapter_config.json"
BLOCKS = "layers_to_transform"
PATTERNS = "layers_pattern"
SLICE = re.compile(r"(.*\.)?c_attn\.[qkv]")  # our names for slices, which PEFT does not know
BAD_PATTERN = (re.error, OverflowError, RecursionError)  # the errors that `re.compile` raises
USED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    BLOCKS,
    PATTERNS,
    "rank_pattern",
    "alpha_pattern",
}
# PEFT's fields that do not change what a trained adapter computes, whatever they say.
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
# Fields that may change it, and the values that are supported.
SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", None),
    "bias": ("none", "lora_only"),  # the tensors decide: PEFT long wrote "lora_only" without any
    "use_rslora": (True, False),
    "use_dora": (True, False),
    "fan_in_fan_out": (True, False),  # how the base stores W; A and B are stored alike in both
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the first B A from W: theirs is another base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
}
UNUSED: tuple = (None, False, [], {})  # the values that switch off any other field of PEFT's
RANKS = (1, 1 << 20)  # minimum and maximum
ALPHAS = (0, 3e6)  # three slices stack the command line's 1e6


def model_fields(model: nn.Module) -> dict[str, Any]:
    """Return the fields of PEFT's file that follow from the model: which of PEFT's classes is to
    wrap it (None: the plain one), and whether W is stored (in, out).
    """
    task_type = None
    can_generate = getattr(model, "can_generate", None)  # transformers' models have it
    if can_generate and can_generate() and model.main_input_name == "input_ids":
        is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        task_type = "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
    fields = {"task_type": task_type, "fan_in_fan_out": False}
    return getattr(model, "adapter_fields", fields)  # our GPT-2 names its own


def stored_fields(directory: Path) -> dict[str, Any]:
    """Return what `model_fields` gave, or PEFT, when the adapter was written."""
    stored = _read(Path(directory) / CONFIG)
    return {
        "task_type": stored.get("task_type"),
        "fan_in_fan_out": stored.get("fan_in_fan_out", False),
    }


def peft_config(config: LoRAConfig, fields: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return the content of PEFT's file for `config` and `model_fields`.

    Stock PEFT loads the base by the name in it, `stock_name(base)`; here it is informational. There
    is no `peft_version`: PEFT fills it in, and warns of it before 0.18.
    """
    name, revision = split_revision(stock_name(base))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": name,
        "revision": revision,
        **fields,
        **config_fields(config),
        "init_lora_weights": True,  # a reader takes A and B as they are
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def load_adapter_config(directory: Path) -> LoRAConfig:
    """Read the adapter's hyper-parameters.

    Raises UserError, naming the field, for anything but LoRA and DoRA on linear layers.
    """
    path = Path(directory) / CONFIG
    stored = {"peft_type": None, "lora_dropout": 0.0} | _read(path)
    for field, value in stored.items():
        known = field in USED or field in IGNORED
        if not known and value not in SUPPORTED.get(field, UNUSED):
            raise UserError(f"{path}: {brief(field)} {brief(value)} is not supported")

    return make_config(
        use_dora=bool(stored.get("use_dora")),
        r=check_number(path, "r", stored.get("r"), int, *RANKS),
        lora_alpha=check_number(path, "lora_alpha", stored.get("lora_alpha"), int | float, *ALPHAS),
        lora_dropout=check_number(path, "lora_dropout", stored["lora_dropout"], int | float, 0, 1),
        target_modules=_targets(path, stored.get("target_modules")),
        use_rslora=bool(stored.get("use_rslora")),
        layers_to_transform=_blocks(path, stored.get(BLOCKS)),
        layers_pattern=_block_lists(path, stored.get(PATTERNS)),
        rank_pattern=_pattern(path, stored, "rank_pattern", int, *RANKS),
        alpha_pattern=_pattern(path, stored, "alpha_pattern", int | float, *ALPHAS),
    )


def _targets(path: Path, targets: Any) -> tuple[str, ...] | str:
    names = [targets] if isinstance(targets, str) else targets
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not targets or not are_names or any(map(SLICE.fullmatch, names)):
        raise UserError(
            f"{path}: target_modules {brief(targets)} is not a list of module names, "
            "nor a regular expression"
        )
    if isinstance(targets, str):
        return targets
    return tuple(dict.fromkeys(targets))


def _blocks(path: Path, stored: Any) -> tuple[int, ...] | None:
    """Read `layers_to_transform`: one number, a list of them, or nothing."""
    if stored is None:
        return None
    blocks = stored if isinstance(stored, list) else [stored]
    numbers = [check_number(path, BLOCKS, block, int, 0, 1 << 20) for block in blocks]
    return tuple(numbers) or None


def _block_lists(path: Path, stored: Any) -> tuple[str, ...] | None:
    """Read `layers_pattern`: one name of a list of blocks, several, or nothing."""
    if not stored:
        return None
    names = [stored] if isinstance(stored, str) else stored
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: {PATTERNS} {brief(stored)} is not a name, nor a list of names")
    return tuple(names)


def _pattern(path: Path, stored: dict, field: str, kind: Any, low: float, high: float) -> dict:
    """Read a dict from regular expressions to numbers from `low` to `high`."""
    pattern = stored.get(field) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {field} {brief(pattern)} is not an object of names and numbers")
    for key, value in pattern.items():
        check_number(path, f"{field} {brief(key)}", value, kind, low, high)
        try:
            re.compile(key)
        except BAD_PATTERN as error:
            raise UserError(
                f"{path}: {field} {brief(key)} is not a regular expression ({error})"
            ) from error
    return pattern


def base_name(directory: Path) -> object:
    """Return the base's name in the config, as OWNER/NAME@REVISION if it has a revision.

    It is informational: a path may mean another model.
    """
    stored = _read(Path(directory) / CONFIG)
    name = stored.get("base_model_name_or_path")
    whole = f"{name}@{stored.get('revision')}"
    if stored.get("revision") and split_revision(whole)[1]:
        return whole
    return name


def _read(path: Path) -> dict[str, Any]:
    if os.path.exists(path.with_name("config.json")) and not os.path.exists(path):
        raise UserError(f"{path.parent}: is a whole model, not an adapter; --base takes it")
    return read_json(path)
