"""Put LoRA layers into a model and freeze the rest."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import nn

from lora.layer import LoRAConfig, LoRALinear
from lora.targets import find_targets, full_name, layer_config

Make = Callable[[nn.Linear, LoRAConfig, Collection[str]], LoRALinear]


def whole_layer(layer: nn.Linear, config: LoRAConfig, slices: Collection[str]) -> LoRALinear:
    """Wrap a layer in plain LoRA. Raises ValueError for slices of it."""
    if slices:
        raise ValueError("slices of a layer need inject(..., make=lora.variants.make_layer)")
    return LoRALinear(layer, config)


def inject(model: nn.Module, config: LoRAConfig, make: Make = whole_layer) -> None:
    """Wrap every `nn.Linear` that `find_targets` names in a LoRA layer; freeze the rest.

    `make` chooses the layer's class; `lora.variants.make_layer` knows them all. Raises
    ValueError if a target, a rank or a combination of variants does not fit, or if the model has
    an adapter already; no layer is wrapped then.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already; `unwrap` it first")

    wrapped = {}
    for name, slices in find_targets(model, config).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        wrapped[name] = make(layer, layer_config(config, full_name(model, name)), slices)

    model.requires_grad_(False)
    for name, lora_layer in wrapped.items():
        model.set_submodule(name, lora_layer)


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
