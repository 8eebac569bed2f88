"""Measure what a change does to a weight's singular vectors: intruders and amplification.

W (out, in) is the weight, dW its change; all in fp32 or fp64.
"""

import torch
from torch import Tensor

TOP = 10  # how many of the largest singular vectors of W + dW are compared
INTRUDER = 0.5  # a vector with a cosine below this is an intruder


def cosines(weight: Tensor, changed: Tensor) -> Tensor:
    """Return for each of the TOP largest left singular vectors of the changed weight its largest
    absolute cosine with any left singular vector of W, (TOP,).

    One below INTRUDER belongs to an intruder dimension (Shuttleworth et al. 2024,
    https://arxiv.org/abs/2410.21228, algorithm 1).
    """
    before = torch.linalg.svd(weight, full_matrices=False).U  # (out, k)
    after = torch.linalg.svd(changed, full_matrices=False).U[:, :TOP]  # (out, TOP)
    return (before.T @ after).abs().amax(0)


def projected_norm(weight: Tensor, u: Tensor, vh: Tensor) -> float:
    """Return ||U^T W V||_F: how large W is in these directions, U (out, r) and V^T (r, in)."""
    return (u.T @ weight @ vh.T).norm().item()


def amplification(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Return ||dW||_F / ||U^T W V||_F for dW = U S V^T: how much larger the change is than W in the
    change's own directions (Hu et al. 2021, 7.3).
    """
    return s.norm().item() / projected_norm(weight, u, vh)
