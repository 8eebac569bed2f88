"""Dropout and attention, faster on a CPU than in PyTorch.

`model/kernels/fast.py` uses these operations in a model. Each operation replaces the PyTorch
function that is named in the operation's docstring, and also computes the gradients. On other
devices and under torch.compile, each operation calls the PyTorch function.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# For at most this many tokens, attention in low precision is faster when it computes the whole (T,
# T) matrix than when it calls PyTorch's fused kernel.
LONGEST_MATRIX = 256
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def is_faster_here(x: Tensor) -> bool:
    """Return whether the operations in this file apply to x: on a CPU, outside torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Compute `F.dropout`, but with different random numbers."""
    if not training or p == 0:
        return x
    if not is_faster_here(x) or p == 1:
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        keep, ctx.scale = draw_mask(x.shape, p)
        ctx.save_for_backward(keep)
        return masked(x, keep).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (keep,) = ctx.saved_tensors
        return masked(g, keep).mul_(ctx.scale), None


def draw_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Return an int8 mask and the scale 1 / (1 - p). Each element of the mask is 0 with probability
    p, otherwise -1.

    Drawing is the bottleneck, so each random 64-bit word serves four elements, 16 bits each. An
    element has one of 2^16 random values. The element is kept if its value is one of the lowest
    `kept` values, and otherwise set to 0. So p is rounded to a multiple of 2^-16.
    """
    kept = round((1 - p) * 2**16)
    kept = min(max(1, kept), 2**16 - 1)
    n = shape.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    values = words.view(torch.int16)[:n].view(shape)
    keep = torch.empty(shape, dtype=torch.int8)
    torch.lt(values, kept - 2**15, out=keep)
    return keep.neg_(), 2**16 / kept


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """Return x where `keep` is -1, and 0 where `keep` is 0.

    A bitwise `and` is faster than a product. The `and` with -1 returns x, because all bits of -1
    are set.
    """
    integer = INTEGERS[x.itemsize]
    return x.view(integer).bitwise_and(keep.to(integer)).view(x.dtype)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool = True
) -> Tensor:
    """Compute `F.scaled_dot_product_attention` with a causal mask: dropout(P) V, where
    P = softmax(Q K^T / sqrt(D) + mask). The mask (T, T) is -inf where a key comes after the query.

    q, k, v and the result are (B, H, T, D).
    """
    # PyTorch's fused kernel does not support dropout, and is slow in low precision for small T.
    fused_is_faster = dropout_p == 0 and (q.dtype == torch.float32 or q.size(2) > LONGEST_MATRIX)
    if not is_faster_here(q) or fused_is_faster:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)

    B, H, T, D = q.shape
    q = q.reshape(B * H, T, D)
    k = k.reshape(B * H, T, D)
    v = v.reshape(B * H, T, D)
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(mask.expand(B * H, T, T), q, k.mT, alpha=1 / math.sqrt(D))
    p = scores.softmax(-1)
    y = p @ v if dropout_p == 0 else _DroppedMatmul.apply(p, v, dropout_p)
    return y.view(B, H, T, D)


class _DroppedMatmul(torch.autograd.Function):
    """Compute Y = dropout(P) V. The backward pass drops P again, because storing dropout(P),
    (B * H, T, T), would cost 5 % of the memory of a step of LoRA (docs/speed.md).

    With G = dL/dY, dL/dV = dropout(P)^T G and dL/dP = dropout(G V^T), with the same mask.
    """

    @staticmethod
    def forward(ctx, p, v, dropout_p):
        keep, ctx.scale = draw_mask(p.shape, dropout_p)
        ctx.save_for_backward(p, v, keep)
        return masked(p, keep) @ (v * ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        p, v, keep = ctx.saved_tensors
        g = g * ctx.scale
        return masked(g @ v.mT, keep), masked(p, keep).mT @ g, None
