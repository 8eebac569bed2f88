"""The variants of LoRA. `VARIANTS` lists the variants that need another config and layer class."""

from collections.abc import Collection
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import nn

from lora.layer import LoRAConfig, LoRALinear
from lora.variants.dora import DoRAConfig, DoRALinear
from lora.variants.pissa import PiSSAConfig, PiSSALinear
from lora.variants.qkv import SlicedLoRALinear

EXCLUSIVE = "DoRA, PiSSA and slices of a layer exclude each other"


class Variant(NamedTuple):
    """PEFT's field for a variant, the field's value in plain LoRA, and our classes for the config
    and the layer."""

    field: str
    plain: bool
    config: type[LoRAConfig]
    layer: type[LoRALinear]


VARIANTS = (
    Variant("use_dora", False, DoRAConfig, DoRALinear),
    Variant("init_lora_weights", True, PiSSAConfig, PiSSALinear),
)
PLAIN = {variant.field: variant.plain for variant in VARIANTS}


def make_config(**asked: Any) -> LoRAConfig:
    """Return a config with these values of PEFT's fields. For example, `use_dora=True` makes a DoRA
    config.

    Raises ValueError for an unknown variant, and for two variants at once.
    """
    kinds = []
    for field, plain in PLAIN.items():
        value = asked.pop(field, plain)
        if value != plain:
            kinds.append(_config_of(field, value))
    if len(kinds) > 1:
        raise ValueError(EXCLUSIVE)
    kind = kinds[0] if kinds else LoRAConfig
    return kind(**asked)


def _config_of(field: str, value: object) -> type[LoRAConfig]:
    for variant in VARIANTS:
        if variant.field == field and getattr(variant.config, field) == value:
            return variant.config
    raise ValueError(f"{field} {value!r:.80} is not supported")


def config_fields(config: LoRAConfig) -> dict[str, Any]:
    """Return the config as a dict of PEFT's fields. Other variants' fields are as in plain LoRA."""
    return PLAIN | asdict(config)


def make_layer(layer: nn.Linear, config: LoRAConfig, slices: Collection[str] = ()) -> LoRALinear:
    """Wrap a layer, or slices of a layer, in a LoRA layer of the config's variant."""
    if slices:
        if type(config) is not LoRAConfig:
            raise ValueError(EXCLUSIVE)
        return SlicedLoRALinear(layer, config, slices)
    for variant in VARIANTS:
        if type(config) is variant.config:
            return variant.layer(layer, config)
    return LoRALinear(layer, config)
