"""Put LoRA layers into a model and freeze the rest."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from lora.layer import LoRAConfig, LoRALinear
from lora.peft_view import peft_view
from lora.targets import ALL_LINEAR, expert_weights, find_targets, layer_config
from lora.variants import make_layer


def inject(model: nn.Module, config: LoRAConfig) -> None:
    """Put a LoRA layer around each `nn.Linear` that `find_targets` returns. Freeze the rest.

    The config is kept as `model.lora_config`. Its class chooses the variant. Raises ValueError if a
    target, a rank or a variant does not fit, or if the model has an adapter already. The model is
    then unchanged. Warns if "all-linear" leaves out the experts of a mixture of experts, and if
    `save_adapter` will refuse the adapter.
    """
    layers = new_layers(model, config)
    _warn_about_experts(model, config, layers)
    install(model, config, layers)


def new_layers(model: nn.Module, config: LoRAConfig) -> dict[str, LoRALinear]:
    """Return the LoRA layers of a model by module name. `install` puts them into the model."""
    prefix = peft_view(model).prefix  # before our GPT-2's names in PEFT's files: "transformer."
    layers = {}
    for name, slices in find_targets(model, config).items():  # slices: q, k, v of c_attn, or none
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        with errors_that_name(name):
            layers[name] = make_layer(layer, layer_config(config, prefix + name), slices)
    return layers


def install(model: nn.Module, config: LoRAConfig, layers: Mapping[str, LoRALinear]) -> None:
    """Freeze the model, and put LoRA layers in place of the linear layers that they wrap."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.lora_config = config  # type: ignore[assignment]  # no tensor and no module


def _warn_about_experts(model: nn.Module, config: LoRAConfig, layers: Iterable[str]) -> None:
    experts = expert_weights(model)
    if experts and config.target_modules == ALL_LINEAR:
        total = sum(weight.numel() for weight in model.parameters())
        share = sum(weight.numel() for weight in experts.values()) / total
        names = sorted({name.rpartition(".")[2] for name in experts})
        warnings.warn(
            f"all-linear leaves out {share:.0%} of the model's weights, because the experts are "
            f"not nn.Linear: {', '.join(names)} (the first is {next(iter(experts))})",
            stacklevel=3,
        )
    misread = misread_by_peft(model, layers)
    if misread:
        warnings.warn(f"save_adapter will refuse this adapter: {misread}", stacklevel=3)


def misread_by_peft(model: nn.Module, layers: Iterable[str]) -> str | None:
    """Return a sentence about adapted layers that PEFT takes for experts, or None."""
    expert_names = peft_view(model).expert_names
    misread = [name for name in layers if name.rpartition(".")[2] in expert_names]
    if not misread:
        return None
    return (
        f"PEFT takes {misread[0]} for the experts in this model, and loses the update; choose "
        f"target_modules without {', '.join(expert_names)}"
    )


@contextmanager
def errors_that_name(layer: str) -> Iterator[None]:
    """Begin the message of a ValueError with the layer's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error


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
