"""GPT-2's operations and its loss, in PyTorch's own calls. Read this before `fast.py`.

`model/fast.py` has a faster twin of each function, under the same name, and the model calls that
one; `tests/model/test_fast.py` compares the two. The parity check trains with the functions here,
which compute bit for bit what transformers and PEFT do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from model import fast


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y = x W^T + b: x (..., in), W (out, in), b (out,), y (..., out)."""
    return F.linear(x, weight, bias)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return 0 with probability p, else x / (1 - p), for each element; in evaluation, x itself."""
    return F.dropout(x, p, training)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Return dropout(softmax(q k^T / sqrt(D) + mask), p) v, all (B, H, T, D). The mask is -inf
    where a key comes after the query, else 0.
    """
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum -log p(target) over the tokens, in nats, with p = softmax(hidden W^T) in fp32.

    hidden (N, C), W = wte.weight (V, C), targets (N,); returns a scalar.
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(target) in nats (N,), and whether the target is the likeliest, bool (N,)."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), targets, reduction="none"), logits.argmax(-1) == targets


OPERATIONS = {f.__name__: f for f in (linear, dropout, causal_attention, tied_cross_entropy, score)}


@contextmanager
def plain_operations(*names: str) -> Iterator[None]:
    """Replace `fast.py`'s functions by those of this file inside the `with`: all, or those named.
    The model then calls these, because it looks each function up in `fast` when it calls it.
    """
    before = {name: getattr(fast, name) for name in names or OPERATIONS}
    vars(fast).update({name: OPERATIONS[name] for name in before})
    try:
        yield
    finally:
        vars(fast).update(before)
