"""LoRA+: train B at a higher learning rate than A."""

from typing import Any

from torch import nn

from lora.parameters import trained_parameters


def loraplus_groups(model: nn.Module, lr: float, ratio: float) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, such as AdamW(loraplus_groups(model, 2e-4, 16)).

    A learns at the rate `lr`. B, and DoRA's magnitude vectors, learn at `ratio` times this rate
    (Hayou et al. 2024, https://arxiv.org/abs/2402.12354). PEFT's create_loraplus_optimizer makes
    the same groups.
    """
    slower = []
    faster = []
    for name, parameter in trained_parameters(model).items():
        if "lora_B" in name or parameter.ndim == 1:
            faster.append(parameter)
        else:
            slower.append(parameter)
    return [{"params": slower, "lr": lr}, {"params": faster, "lr": ratio * lr}]
