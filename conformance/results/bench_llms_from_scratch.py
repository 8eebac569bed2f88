"""llms-from-scratch, the package of the book: pip install llms-from-scratch."""

import torch
from llms_from_scratch.appendix_e import LinearWithLoRA


def wrap(linear, r, alpha, dropout):
    if linear.weight.dtype is not torch.float32:
        raise NotImplementedError("A and B are fp32, and x must be fp32")
    if dropout:
        raise NotImplementedError("LinearWithLoRA has no dropout")
    linear.requires_grad_(False)  # the book freezes the model before it replaces layers
    return LinearWithLoRA(linear, r, alpha)


def factors(layer):
    return layer.lora.A, layer.lora.B
