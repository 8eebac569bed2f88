"""The training loss and the token losses of a tied head. Logits are the largest tensor, so they are
computed in chunks.

This file is for a CPU or Apple's GPU. `model/kernels/cuda_loss.py` is for CUDA.

Shapes: hidden (N, C), weight (V, C), targets (N,), logits z (n, V) of a chunk of n tokens.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt2 import IGNORE_INDEX

CHUNK = 1 << 24  # number of logits in a chunk
LARGE_CHUNK = 1 << 26  # number of logits in a chunk if the head is trained
CACHED_LOGITS = 1 << 19  # number of logits whose softmax fits into a CPU's cache
TILE = 128  # matmuls are fastest if the number of tokens is a multiple of this
SLICE_BYTES = 1 << 12  # bytes per token in a slice of dL/dz. Each matmul reads one slice
SMALLEST = 1e-30  # for a smaller p, -log(p) is computed from z. fp32 loses digits below 1e-38


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")`, in nats.

    Matmuls run in the precision that `compute_dtype` returns. The softmax runs in fp32.
    """
    rows = scored_rows(targets)
    if len(rows) < len(targets):
        hidden = hidden[rows]
        targets = targets[rows]
    return _TiedCrossEntropy.apply(hidden, weight, targets, compute_dtype(hidden))


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(target) in nats, fp32 (N,), and whether the target is likeliest, bool (N,).

    p = softmax(hidden weight^T). For a target of IGNORE_INDEX, return 0 and False.
    """
    losses = torch.zeros(len(targets), device=hidden.device)
    hits = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    dtype = compute_dtype(hidden)
    w = weight.to(dtype)
    for rows in scored_rows(targets).split(chunk_size(len(w), CHUNK)):
        z = F.linear(hidden[rows].to(dtype), w)
        losses[rows], hits[rows] = losses_of_logits(z, targets[rows])
    return losses, hits


def scored_rows(targets: Tensor) -> Tensor:
    """Return the indices (n,) of the scored targets."""
    return (targets != IGNORE_INDEX).nonzero().squeeze(1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of a matmul with x: the autocast precision, or otherwise x.dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def chunk_size(vocab_size: int, logits: int) -> int:
    """Return the number of tokens in a chunk. A chunk then has at most `logits` logits."""
    size = max(1, logits // vocab_size)
    return size - size % TILE if size > TILE else size


def blocks(z: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split logits z (n, V) and their targets (n,) into blocks of a few rows.

    Each block is read and written several times, so a block should fit into a CPU's cache.
    """
    n, V = z.shape
    size = n
    if z.is_cpu:
        size = max(1, CACHED_LOGITS // V)
    return zip(z.split(size), targets.split(size), strict=True)


def losses_of_logits(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two results of `token_losses`, (n,) each, from logits z (n, V)."""
    losses = []
    hits = []
    for rows, y in blocks(z, targets):
        losses.append(cross_entropy(rows, y))
        hits.append(rows.argmax(-1) == y)
    return torch.cat(losses), torch.cat(hits)


def cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(z)[target] in fp32, (n,)."""
    return F.cross_entropy(z.float(), targets, reduction="none")


def to_gradient(z: Tensor, targets: Tensor) -> Tensor:
    """Return the losses L = -log softmax(z)[target], fp32 (n,). Overwrite z (n, V) with
    dL/dz = softmax(z) - onehot(target).
    """
    losses = []
    for rows, y in blocks(z, targets):
        p = torch.softmax(rows, -1, dtype=torch.float32)
        p_of_target = p.gather(1, y[:, None])
        if z.is_cpu and p_of_target.min() > SMALLEST:  # on a GPU, this check would synchronise
            losses.append(-p_of_target.log().squeeze(1))
        else:
            losses.append(cross_entropy(rows, y))
        rows.copy_(p.scatter_(1, y[:, None], p_of_target - 1))
    return torch.cat(losses)


class LossAndGradient(torch.autograd.Function):
    """A loss whose forward pass also computes and saves dL/dh and dL/dW (None if W is frozen).

    The loss is a scalar, so the backward pass only multiplies the saved gradients by a factor.
    """

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        dweight = None if grad_w is None else grad_w.mul_(grad)  # in place: dW is large
        return grad_h * grad, dweight, None, None


class _TiedCrossEntropy(LossAndGradient):
    """Compute the loss and its gradient.

    With z = h W^T, dL/dh = dL/dz W and dL/dW = (dL/dz)^T h. Only one chunk of z is in memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        h = hidden.to(dtype)
        w = weight.to(dtype)
        total = torch.zeros((), device=h.device)
        grad_h = torch.zeros_like(h, dtype=torch.float32)
        grad_w = None
        logits = CHUNK
        if ctx.needs_input_grad[1]:
            grad_w = torch.zeros_like(weight)
            logits = LARGE_CHUNK

        size = chunk_size(len(w), logits)
        for start in range(0, len(h), size):
            rows = slice(start, start + size)
            z = F.linear(h[rows], w)
            total += to_gradient(z, targets[rows]).sum()
            add_gradient_of_hidden(grad_h[rows], z, w)
            if grad_w is not None:
                add_gradient_of_weight(grad_w, z, h[rows])
            del z  # frees memory for the next chunk

        ctx.save_for_backward(grad_h.to(hidden.dtype), grad_w)
        return total


def add_gradient_of_hidden(total: Tensor, dz: Tensor, w: Tensor) -> None:
    """Add dL/dz W to `total` (n, C), summed over slices of the vocabulary."""
    size = slice_width(dz)
    for dz_slice, w_slice in zip(dz.split(size, 1), w.split(size), strict=True):
        total += dz_slice @ w_slice


def add_gradient_of_weight(total: Tensor, dz: Tensor, h: Tensor) -> None:
    """Add (dL/dz)^T h to `total` (V, C)."""
    if dz.dtype == torch.float32:
        total += (h.T @ dz).T  # one transposed matmul is faster than one matmul per slice
        return
    size = slice_width(dz)
    for rows, dz_slice in zip(total.split(size), dz.split(size, 1), strict=True):
        rows += dz_slice.T @ h


def slice_width(dz: Tensor) -> int:
    """Return the number of columns of dL/dz (n, V) to multiply at a time."""
    if dz.is_cpu:
        return SLICE_BYTES // dz.itemsize
    return dz.size(1)
