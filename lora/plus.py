"""LoRA+: train B at a higher learning rate than A."""

from torch import nn


def parameter_groups(model: nn.Module, ratio: float | None) -> list[dict]:
    """Return parameter groups for an optimizer. `lr_scale` multiplies a group's learning rate.

    LoRA+ trains B, and DoRA's magnitude vectors, at `ratio` times the learning rate of A (Hayou et
    al. 2024, https://arxiv.org/abs/2402.12354). PEFT's create_loraplus_optimizer makes the same
    groups. If `ratio` is None, a single group contains all parameters.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if ratio is None:
        return [{"params": list(trained.values()), "lr_scale": 1.0}]

    slower = []
    faster = []
    for name, parameter in trained.items():
        if "lora_B" in name or parameter.ndim == 1:
            faster.append(parameter)
        else:
            slower.append(parameter)
    return [{"params": slower, "lr_scale": 1.0}, {"params": faster, "lr_scale": ratio}]
