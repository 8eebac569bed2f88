"""Know the variants of LoRA: which config asks for which layer.

A variant is a file of its own, with its field and its layer, and a line in `LAYERS`.
"""

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from torch import nn

from lora.dora import DoRAConfig, DoRALinear
from lora.layer import LoRAConfig, LoRALinear
from lora.pissa import PiSSAConfig, PiSSALinear
from lora.slices import SlicedLoRALinear

LAYERS: dict[type[LoRAConfig], type[LoRALinear]] = {
    LoRAConfig: LoRALinear,
    DoRAConfig: DoRALinear,
    PiSSAConfig: PiSSALinear,
}
EXCLUSIVE = "DoRA, PiSSA and slices of a layer exclude each other"


def make_config(
    use_dora: bool = False, init_lora_weights: bool | str = True, **fields: Any
) -> LoRAConfig:
    """Return the config that PEFT's fields ask for.

    Raises ValueError for variants that are not known here, or that exclude each other.
    """
    if init_lora_weights not in (True, "pissa"):
        raise ValueError(f"init_lora_weights {init_lora_weights!r} is not True or 'pissa'")
    if use_dora and init_lora_weights == "pissa":
        raise ValueError(EXCLUSIVE)
    if use_dora:
        return DoRAConfig(**fields)
    if init_lora_weights == "pissa":
        return PiSSAConfig(**fields)
    return LoRAConfig(**fields)


def config_fields(config: LoRAConfig) -> dict[str, Any]:
    """Return every field that PEFT has for LoRA and its variants, with its value."""
    return {"use_dora": False, "init_lora_weights": True} | asdict(config)


def make_layer(layer: nn.Linear, config: LoRAConfig, slices: Collection[str] = ()) -> LoRALinear:
    """Wrap a layer, or slices of it, in what its config asks for: `inject`'s `make`."""
    if not slices:
        return LAYERS[type(config)](layer, config)
    if type(config) is not LoRAConfig:
        raise ValueError(EXCLUSIVE)
    return SlicedLoRALinear(layer, config, slices)
