"""LoRA-FA: A stays as it was drawn, and B alone is trained."""

from torch import nn

from lora.inject import lora_layers


def freeze_a(model: nn.Module) -> None:
    """Take A out of training (Zhang et al. 2023, https://arxiv.org/abs/2308.03303).

    B's gradient needs A dropout(x), (..., r); x itself (..., in) is kept for the backward pass for
    A's gradient alone, and so is no longer kept. Like all that is frozen, A is held, and saved, in
    the run's precision.
    """
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
