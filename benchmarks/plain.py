"""PyTorch's own products, dropout, attention and loss in place of model/ops.py: slower, and bit for
bit what PEFT and transformers run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.nn.functional as F
from torch import Tensor

from model import ops


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


@contextmanager
def plain_operations() -> Iterator[None]:
    """Inside the `with`, the model is made of these."""
    with mock.patch.multiple(ops, linear=F.linear, dropout=F.dropout,
                             causal_attention=causal_attention,
                             tied_cross_entropy=tied_cross_entropy):
        yield
