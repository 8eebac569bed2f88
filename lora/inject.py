"""Put LoRA layers into a model and freeze the rest."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora.dora import DoRALinear
from lora.layer import LoRAConfig, LoRALinear
from lora.pissa import PiSSALinear
from lora.slices import SlicedLoRALinear
from lora.targets import find_targets, layer_config


def inject(model: nn.Module, config: LoRAConfig) -> None:
    """Wrap every `nn.Linear` that `find_targets` names in a `LoRALinear`; freeze the rest.

    Raises ValueError, and leaves the model as it was, if a target, a rank or a combination of
    variants does not fit, or if the model has an adapter already.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already; `unwrap` it first")
    wrapped = {
        name: _wrap(model.get_submodule(name), layer_config(config, name), slices)
        for name, slices in find_targets(model, config).items()
    }
    model.requires_grad_(False)
    for name, layer in wrapped.items():
        model.set_submodule(name, layer)


def _wrap(layer: nn.Linear, config: LoRAConfig, slices: set[str]) -> LoRALinear:
    pissa = config.init_lora_weights == "pissa"
    if not (pissa or config.init_lora_weights is True):
        raise ValueError(f"init_lora_weights {config.init_lora_weights!r} is not True or 'pissa'")
    if sum((config.use_dora, pissa, bool(slices))) > 1:
        raise ValueError("DoRA, PiSSA and slices of a layer exclude each other")
    if slices:
        return SlicedLoRALinear(layer, config, slices)
    kind = DoRALinear if config.use_dora else PiSSALinear if pissa else LoRALinear
    return kind(layer, config)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers by module name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Make the model compute what its base does inside the `with`. Raises ValueError if merged."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged into the base; unmerge it first")
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
