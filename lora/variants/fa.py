"""LoRA-FA: keep A at its random start, and train only B."""

from torch import nn

from lora.inject import lora_layers


def freeze_a(model: nn.Module) -> None:
    """Freeze A in every LoRA layer (Zhang et al. 2023, https://arxiv.org/abs/2308.03303).

    The gradient of A needs the layer's input (..., in). The gradient of B needs only
    A dropout(x), (..., r). So if A is frozen, autograd does not store the layer's input.
    """
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
