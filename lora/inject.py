"""Put LoRA layers into a model, freeze the rest, and say what is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora.config import LoRAConfig
from lora.layer import LoRALinear

REFUSED = {"lm_head": "the head is tied to wte, and an update of one would change both",
           "wte": "it is tied to the head", "wpe": "it is an embedding, not a linear layer"}


def inject(model: nn.Module, config: LoRAConfig) -> None:
    """Wrap every `nn.Linear` named by `config.target_modules` in a `LoRALinear`; freeze the rest.

    A target is a module's full name or a suffix of it after a dot, as in PEFT: `c_proj` is the
    attention's and the MLP's. Raises ValueError, and leaves the model as it was, when a target
    matches nothing or something that is not a linear layer, or the rank is above a layer's size.
    """
    targets = _find_targets(model, config.target_modules)
    wrapped = {name: LoRALinear(layer, config) for name, layer in targets.items()}
    model.requires_grad_(False)
    for name, layer in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _find_targets(model: nn.Module, target_modules: tuple[str, ...]) -> dict[str, nn.Linear]:
    found: dict[str, nn.Linear] = {}
    for target in target_modules:
        if reason := REFUSED.get(target.rpartition(".")[2]):
            raise ValueError(f"target module {target!r} is refused: {reason}")
        # Full names are those of transformers' GPT2LMHeadModel, which PEFT writes for "all-linear".
        matches = {name: module for name, module in model.named_modules()
                   if f".transformer.{name}".endswith(f".{target}")}
        if not matches:
            raise ValueError(f"target module {target!r} is not in the model; "
                             f"it has {', '.join(linear_names(model))}")
        for name, module in matches.items():
            if not isinstance(module, nn.Linear):
                raise ValueError(f"target module {target!r} matches {name}, "
                                 f"a {type(module).__name__}; only linear layers are adapted")
        found |= matches
    return {name: module for name, module in model.named_modules() if name in found}


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the linear layers' names: what can be a target."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rpartition(".")[2] for name in names})


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by module name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge(model: nn.Module) -> None:
    """Merge every LoRA layer into its base layer."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def unwrap(model: nn.Module) -> None:
    """Put the plain linear layers back in place, with what was merged into them."""
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model computes what its base does. Unmerge first."""
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


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, a tied weight counted once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def describe_parameters(model: nn.Module) -> str:
    """The line that PEFT's `print_trainable_parameters` prints."""
    trainable, total = count_parameters(model)
    return (f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}")
