"""Put LoRA layers into a model and freeze the rest."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora.layer import LoRAConfig, LoRALinear

REFUSED = {"lm_head": "the head is tied to wte, and an update of one would change both",
           "wte": "it is tied to the head", "wpe": "it is an embedding, not a linear layer"}


def inject(model: nn.Module, config: LoRAConfig) -> None:
    """Wrap every `nn.Linear` named by `config.target_modules` in a `LoRALinear`; freeze the rest.

    A target is a module's full name or a suffix of it after a dot, as in PEFT: `c_proj` is the
    attention's and the MLP's. Raises ValueError, and leaves the model as it was, if a target
    matches nothing or something that is not a linear layer, if the rank is above a layer's size,
    or if the model has an adapter already.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already; merge it first")
    targets = _find_targets(model, config.target_modules)
    # By layer, and not by name: a layer that has two names stays one layer.
    wrapped = {layer: LoRALinear(layer, config) for layer in dict.fromkeys(targets.values())}
    model.requires_grad_(False)
    for name, layer in targets.items():
        model.set_submodule(name, wrapped[layer])


def _find_targets(model: nn.Module, target_modules: tuple[str, ...]) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear)}
    found = set()
    for target in target_modules:
        if reason := REFUSED.get(target.rpartition(".")[2]):
            raise ValueError(f"target module {target!r} is refused: {reason}")
        # Full names are those of transformers' GPT2LMHeadModel, which PEFT writes for "all-linear".
        matches = [name for name in modules if f".transformer.{name}".endswith(f".{target}")]
        if not matches:
            raise ValueError(f"target module {target!r} is not in the model; "
                             f"it has {', '.join(sorted(linear))}")
        for name in matches:
            if not isinstance(modules[name], nn.Linear):
                raise ValueError(f"target module {target!r} matches {name}, a "
                                 f"{type(modules[name]).__name__}; only linear layers are adapted")
        found |= set(matches)
    return {name: module for name, module in modules.items() if name in found}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers by module name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model computes what its base does. Raises ValueError if merged."""
    layers = lora_layers(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged into the base; unmerge it first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
