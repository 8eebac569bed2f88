"""LoRA-FA: A stays as it was drawn."""

from torch import nn

from lora.inject import lora_layers


def freeze_a(model: nn.Module) -> None:
    """Train B alone (LoRA-FA, Zhang et al. 2023, https://arxiv.org/abs/2308.03303, equation 3).

    B's gradient needs A dropout(x), r numbers a token; x itself (in), which only A's gradient
    needs, is no longer kept for the backward pass.
    """
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
