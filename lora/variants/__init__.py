"""Know the variants of LoRA: which config asks for which layer.

A variant is a file of its own, with its field and its layer, and a line in `LAYERS`.
"""

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from torch import nn

from lora.layer import LoRAConfig, LoRALinear
from lora.variants.dora import DoRAConfig, DoRALinear
from lora.variants.lora_ga import LoRAGAConfig, LoRAGALinear
from lora.variants.pissa import PiSSAConfig, PiSSALinear
from lora.variants.slices import SlicedLoRALinear

LAYERS: dict[type[LoRAConfig], type[LoRALinear]] = {
    LoRAConfig: LoRALinear,
    DoRAConfig: DoRALinear,
    PiSSAConfig: PiSSALinear,
    LoRAGAConfig: LoRAGALinear,
}
PLAIN = {"use_dora": False, "init_lora_weights": True}  # what PEFT's fields say of no variant
EXCLUSIVE = "DoRA, PiSSA, LoRA-GA and slices of a layer exclude each other"


def make_config(**asked: Any) -> LoRAConfig:
    """Return the config that PEFT's fields ask for: plain LoRA's, or that of the one variant whose
    own field has its value.

    Raises ValueError for variants that are not known here, or that exclude each other.
    """
    variants = {name: asked.pop(name, value) for name, value in PLAIN.items()}
    kinds = []
    for name, value in variants.items():
        if value == PLAIN[name]:
            continue
        known = [kind for kind in LAYERS if getattr(kind, name, None) == value]
        if not known:
            raise ValueError(f"{name} {value!r} is not supported")
        kinds += known
    if len(kinds) > 1:
        raise ValueError(EXCLUSIVE)
    kind = kinds[0] if kinds else LoRAConfig
    return kind(**asked)


def config_fields(config: LoRAConfig) -> dict[str, Any]:
    """Return every field that PEFT has for LoRA and its variants, with its value."""
    return PLAIN | asdict(config)


def make_layer(layer: nn.Linear, config: LoRAConfig, slices: Collection[str] = ()) -> LoRALinear:
    """Wrap a layer, or slices of it, in what its config asks for: `inject`'s `make`."""
    if not slices:
        return LAYERS[type(config)](layer, config)
    if type(config) is not LoRAConfig:
        raise ValueError(EXCLUSIVE)
    return SlicedLoRALinear(layer, config, slices)
