"""Riemannian preconditioning: a gradient step depends only on the product B A.

AdamW scales each element of the gradient, so a step of AdamW still depends on the split into B and
A.
"""

import torch
from torch import nn

from lora.inject import lora_layers

DAMPING = 1e-6  # delta, as in the authors' code


@torch.no_grad()
def precondition(model: nn.Module) -> None:
    """Precondition the gradients of A and B in every LoRA layer (Zhang & Pilanci 2024,
    https://arxiv.org/abs/2402.02347), before the optimizer's step:

    dA <- (B^T B + delta I)^-1 dA    dB <- dB (A A^T + delta I)^-1

    For every invertible R (r, r), the pairs (B, A) and (B R^-1, R A) have the same product. After a
    gradient step, the new product depends on R. After a preconditioned step, the new product
    depends on R only through delta. Slices such as c_attn.q are preconditioned separately. Other
    gradients, such as the gradients of DoRA's magnitude vectors, stay unchanged.

    The inverses are computed in fp64, because B^T B can be nearly singular. On MPS, which lacks
    fp64, the inverses are computed in fp32.
    """
    for layer in lora_layers(model).values():
        weight_b = next(layer.lora_B.parameters())  # (out, r), or n blocks (d, r)
        weight_a = layer.lora_A.weight  # (r, in), or (n r, in)
        assert weight_a.grad is not None
        assert weight_b.grad is not None

        wide = torch.float32 if weight_a.device.type == "mps" else torch.float64
        b = weight_b.to(wide).view(-1, *weight_b.shape[-2:])  # (n, d, r)
        a = weight_a.to(wide).view(len(b), -1, weight_a.shape[1])  # (n, r, in)
        db = weight_b.grad.to(wide).view_as(b)
        da = weight_a.grad.to(wide).view_as(a)

        weight_a.grad.copy_((damped_inverse(b.mT @ b) @ da).view_as(weight_a))
        weight_b.grad.copy_((db @ damped_inverse(a @ a.mT)).view_as(weight_b))


def damped_inverse(gram: torch.Tensor) -> torch.Tensor:
    """Return (G + delta I)^-1 for each G (n, r, r)."""
    # `inv_ex` skips the error check, which would synchronise a GPU.
    gram.diagonal(dim1=-2, dim2=-1).add_(DAMPING)
    return torch.linalg.inv_ex(gram).inverse
