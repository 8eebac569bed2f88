"""Read, strictly, and fill adapter_config.json, PEFT's file of an adapter's hyper-parameters."""

import os
import re
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError
from common.files import brief, check_number, read_json
from lora.layer import LoRAConfig
from lora.slices import SLICES

CONFIG = "adapter_config.json"
BLOCKS = "layers_to_transform"
BAD_PATTERN = (re.error, OverflowError, RecursionError)  # what Python says of one
USED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    BLOCKS,
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
RANKS, ALPHAS = (1, 1 << 20), (0, 3e6)  # min and max; three slices stack the command line's 1e6
UNUSED = (None, False, [], {})  # the values that switch off any other field of PEFT's


def peft_config(config: LoRAConfig, base: str) -> dict:
    """Return the content of PEFT's file for `config`; `base` names the base for people."""
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

    Raises UserError, naming the field, for anything but LoRA and DoRA on linear layers.
    """
    path = Path(directory) / CONFIG
    stored = {"peft_type": None, "lora_dropout": 0.0} | _read(path)
    for field, value in stored.items():
        if field not in USED | IGNORED and value not in SUPPORTED.get(field, UNUSED):
            raise UserError(f"{path}: {brief(field)} {brief(value)} is not supported")
    targets, blocks = stored.get("target_modules"), stored.get(BLOCKS)
    names = [targets] if isinstance(targets, str) else targets
    if (
        not targets
        or not isinstance(names, list)
        or not all(
            isinstance(name, str) and name.rpartition(".")[2] not in SLICES for name in names
        )
    ):
        raise UserError(
            f"{path}: target_modules {brief(targets)} is not a list of module names, "
            "nor a regular expression"
        )
    blocks = blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]
    return LoRAConfig(
        r=check_number(path, "r", stored.get("r"), int, *RANKS),
        lora_alpha=check_number(path, "lora_alpha", stored.get("lora_alpha"), int | float, *ALPHAS),
        lora_dropout=check_number(path, "lora_dropout", stored["lora_dropout"], int | float, 0, 1),
        target_modules=targets if isinstance(targets, str) else tuple(dict.fromkeys(targets)),
        use_rslora=bool(stored.get("use_rslora")),
        layers_to_transform=tuple(
            check_number(path, BLOCKS, block, int, 0, 1 << 20) for block in blocks
        )
        or None,
        rank_pattern=_pattern(path, stored, "rank_pattern", int, *RANKS),
        alpha_pattern=_pattern(path, stored, "alpha_pattern", int | float, *ALPHAS),
        use_dora=bool(stored.get("use_dora")),
    )


def _pattern(path: Path, stored: dict, field: str, *limits) -> dict:
    pattern = stored.get(field) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {field} {brief(pattern)} is not an object of names and numbers")
    for key, value in pattern.items():
        check_number(path, f"{field} {brief(key)}", value, *limits)
        try:
            re.compile(key)
        except BAD_PATTERN as error:
            raise UserError(
                f"{path}: {field} {brief(key)} is not a regular expression ({error})"
            ) from error
    return pattern


def base_name(directory: Path) -> object:
    """Return the base's name in the config: for people, since a path may mean another model."""
    return _read(Path(directory) / CONFIG).get("base_model_name_or_path")


def _read(path: Path) -> dict:
    if os.path.exists(path.with_name("config.json")) and not os.path.exists(path):
        raise UserError(f"{path.parent}: is a whole model, not an adapter; --base takes it")
    return read_json(path)
