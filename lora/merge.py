"""Add an adapter to the weights of the base, or remove an adapter from a model."""

from torch import nn

from lora.guards import refuse_hooks, tied_modules
from lora.inject import errors_that_name, lora_layers


def merge(model: nn.Module) -> None:
    """Add the update of every LoRA layer to W.

    Raises ValueError, naming the layer, if a layer cannot be merged, or if another module has come
    to share W since `inject`. After an error, no layer is merged.
    """
    layers = lora_layers(model)
    tied = tied_modules(model)
    for name, layer in layers.items():
        with errors_that_name(name):
            layer.check_mergeable()
            reason = tied.get(f"{name}.base_layer")
            if reason and not layer.merged:
                raise ValueError(f"{reason}, and a merge would change both")
    for layer in layers.values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, up to rounding.

    Raises ValueError, naming the layer, if A or B has changed since the merge. After this error, no
    layer is unmerged.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        with errors_that_name(name):
            layer.check_unmergeable()
    for layer in layers.values():
        layer.unmerge()


def unwrap(model: nn.Module) -> None:
    """Replace each LoRA layer by the wrapped linear layer. After `merge`, W includes the update.

    Raises ValueError for unmerged layers of PiSSA, because removing A and B would remove
    part of the original W, and for a LoRA layer with a forward hook. After an error, the model is
    unchanged.
    """
    linear_layers = {}
    for name, layer in lora_layers(model).items():
        with errors_that_name(name):
            refuse_hooks(layer)
            linear_layers[name] = layer.unwrapped()
    for name, linear in linear_layers.items():
        model.set_submodule(name, linear)
    for module in model.modules():  # a wrapper does not have the config, but the model inside
        vars(module).pop("lora_config", None)
