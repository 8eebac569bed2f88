"""The loss and the scores of a tied head, without ever holding all logits: the largest tensor.

On CUDA `model/kernels/cuda_loss.py` computes them.

Shapes: hidden (N, C), weight (V, C), targets (N,), logits z (n, V) of a chunk of n tokens.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import cuda_loss
from model.kernels.cpu import linear, matmul

CHUNK = 1 << 24  # logits at a time, to save memory
LARGE_CHUNK = 1 << 26  # if each chunk costs an addition to the head's gradient
BLOCK = 1 << 19  # logits whose softmax stays in the cache
TILE = 128  # tokens: with a multiple of it, matmuls are faster
PART = 1 << 12  # bytes of a token's logits: the fastest width for the gradient's matmuls
SMALLEST = 1e-30  # no logarithm of a smaller probability: from 1e-38 down, fp32 loses digits


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(target), nats, fp32 (N,), and whether the target is the likeliest, bool (N,).

    p = softmax(hidden weight^T).
    """
    dtype = _compute_dtype(hidden)
    if hidden.is_cuda:
        return cuda_loss.score(hidden, weight, targets, dtype)
    h = hidden.to(dtype)
    w = weight.to(dtype)
    scores = [
        score_logits(linear(h[rows], w), targets[rows]) for rows in chunks(len(h), len(w), CHUNK)
    ]
    losses, hits = zip(*scores, strict=True)
    return torch.cat(losses), torch.cat(hits)


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")` in fp32, nats.

    Matmuls run in autocast's precision, the softmax in fp32.
    """
    kind = cuda_loss.TiedCrossEntropy if hidden.is_cuda else _TiedCrossEntropy
    return kind.apply(hidden, weight, targets, _compute_dtype(hidden))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def chunks(tokens: int, vocab_size: int, logits: int) -> Iterator[slice]:
    """Split the tokens into chunks of at most so many logits."""
    size = max(1, logits // vocab_size)
    if size > TILE:
        size -= size % TILE
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def blocks(z: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split logits z (n, V) and their targets (n,) into blocks of a few rows.

    What is read and written several times stays in a CPU's cache.
    """
    n, V = z.shape
    size = n
    if z.is_cpu:
        size = max(1, BLOCK // V)
    return zip(z.split(size), targets.split(size), strict=True)


def score_logits(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `score` does, (n,) both."""
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
    """Replace z (n, V) by dL/dz = softmax(z) - onehot(target), and return the losses, fp32 (n,):
    L = -log softmax(z)[target].
    """
    losses = []
    for rows, y in blocks(z, targets):
        p = torch.softmax(rows, -1, dtype=torch.float32)
        p_of_target = p.gather(1, y[:, None])
        if z.is_cpu and p_of_target.min() > SMALLEST:  # a GPU would have to wait
            losses.append(-p_of_target.log().squeeze(1))
        else:
            losses.append(cross_entropy(rows, y))
        rows.copy_(p.scatter_(1, y[:, None], p_of_target - 1))
    return torch.cat(losses)


class _TiedCrossEntropy(cuda_loss.LossAndGradient):
    """Compute the loss and its gradient on a CPU or Apple's GPU.

    With z = h W^T, dL/dh = dL/dz W and dL/dW = dL/dz^T h. Nothing (N, V) is kept.
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

        for rows in chunks(len(h), len(w), logits):
            z = linear(h[rows], w)
            total += to_gradient(z, targets[rows]).sum()
            add_gradient_of_hidden(grad_h[rows], z, w)
            if grad_w is not None:
                add_gradient_of_weight(grad_w, z, h[rows])
            del z  # its memory is the next one's

        ctx.save_for_backward(grad_h.to(hidden.dtype), grad_w)
        return total


def add_gradient_of_hidden(total: Tensor, dz: Tensor, w: Tensor) -> None:
    """Add dL/dz W to `total` (n, C): for each part of the vocabulary what it adds to the sum."""
    size = part_size(dz)
    for dz_part, w_part in zip(dz.split(size, 1), w.split(size), strict=True):
        total += matmul(dz_part, w_part)


def add_gradient_of_weight(total: Tensor, dz: Tensor, h: Tensor) -> None:
    """Add dL/dz^T h to `total` (V, C)."""
    if dz.dtype == torch.float32:
        total += matmul(h.T, dz).T  # the transposed matmul, whole, is faster
        return
    size = part_size(dz)
    for part, dz_part in zip(total.split(size), dz.split(size, 1), strict=True):
        part += matmul(dz_part.T, h)


def part_size(dz: Tensor) -> int:
    """Return the number of columns of dL/dz (n, V) to multiply at a time."""
    if dz.is_cpu:
        return PART // dz.itemsize
    return dz.size(1)
