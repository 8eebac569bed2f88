"""LoRA-FA: keep A at its random start, and train only B."""

from torch import nn

from lora.inject import lora_layers


def freeze_a(model: nn.Module) -> None:
    """Freeze A in every LoRA layer (Zhang et al. 2023, https://arxiv.org/abs/2308.03303).

    Only A's gradient needs the adapted layer's input (..., in). B's gradient needs A dropout(x),
    (..., r). So less is stored. Like every frozen weight, A is rounded to the run's precision.
    """
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
