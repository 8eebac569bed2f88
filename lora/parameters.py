"""The parameters that an optimizer trains, and their number."""

from torch import nn

from lora.quantised import quantised_weights


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name. After `inject`, these are A, B and
    DoRA's magnitudes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained parameters, and of all parameters and quantised weights. A tied
    weight counts once."""
    trained = sum(p.numel() for p in trained_parameters(model).values())
    return trained, sum(p.numel() for p in model.parameters()) + quantised_weights(model)
