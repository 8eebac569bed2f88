"""LoRA-FA: A stays as it was drawn, and B alone is trained."""

from torch import nn

from lora.inject import lora_layers


def freeze_a(model: nn.Module) -> None:
    """Freeze A in every LoRA layer (Zhang et al. 2023, https://arxiv.org/abs/2308.03303).

    The adapted layer's input (..., in) was kept for A's gradient alone; now only A dropout(x),
    (..., r), is kept, for B's. Like every frozen weight, A is rounded to the run's precision.
    """
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
