"""Wrap linear layers of a model in LoRA layers, and freeze the original parameters."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from lora.config import LoRAConfig
from lora.dora import DoRALinear
from lora.guards import warn_about_gaps
from lora.layer import LoRALinear
from lora.peft_view import peft_view
from lora.pissa import PiSSALinear
from lora.slices import SlicedLoRALinear
from lora.targets import find_targets, layer_config, refuse_unused_patterns

Model = TypeVar("Model", bound=nn.Module)


def inject(model: Model, config: LoRAConfig) -> Model:
    """Wrap each `nn.Linear` that `find_targets` returns in a LoRA layer. Freeze the original
    parameters. Return the same model.

    The config is stored as `model.lora_config`. Raises ValueError if a target, rank, pattern or
    variant does not fit the model, or if the model already has an adapter. After an error, the
    model is unchanged. Warns if "all-linear" leaves out `unfit_layers` or the experts of a mixture
    of experts, or if `save_adapter` will refuse the adapter.
    """
    layers = new_layers(model, config)
    prefix = peft_view(model).prefix
    refuse_unused_patterns(config, (prefix + name for name in layers))
    warn_about_gaps(model, config, layers)
    install(model, config, layers)
    return model


def new_layers(model: nn.Module, config: LoRAConfig) -> dict[str, LoRALinear]:
    """Make the LoRA layers for a model, and return them by module name. `install` puts the layers
    into the model."""
    prefix = peft_view(model).prefix
    layers = {}
    for name, slices in find_targets(model, config).items():  # no slices: the whole layer
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        with errors_that_name(name):
            layers[name] = make_layer(layer, layer_config(config, prefix + name), slices)
    return layers


def make_layer(layer: nn.Linear, config: LoRAConfig, slices: Collection[str] = ()) -> LoRALinear:
    """Wrap a layer, or slices of a layer such as {"q"}, in the LoRA layer that the config asks
    for."""
    if slices:
        for field, plain in {"use_dora": False, "init_lora_weights": True}.items():
            value = getattr(config, field)
            if value != plain:
                raise ValueError(
                    f"{field}={value!r} and slices in target_modules exclude each other"
                )
        return SlicedLoRALinear(layer, config, slices)
    if config.use_dora:
        return DoRALinear(layer, config)
    if config.init_lora_weights == "pissa":
        return PiSSALinear(layer, config)
    return LoRALinear(layer, config)


def install(model: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALinear]) -> None:
    """Freeze the model, and replace the wrapped linear layers by the LoRA layers."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.lora_config = config  # type: ignore[assignment]  # mypy expects a tensor or a module


@contextmanager
def errors_that_name(layer: str) -> Iterator[None]:
    """Put the layer's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers by module name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside a `with` block. Raises ValueError if the adapter is merged."""
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
