"""The loss and the scores of a tied head, without ever holding all logits: the largest tensor.

On CUDA `model/cuda_loss.py` computes them.

Shapes: hidden (N, C), weight (V, C), targets (N,), logits z (n, V) of a chunk of n tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import cuda_loss
from model.cpu_operations import linear

CHUNK = 1 << 24  # logits at a time, to save memory
LARGE_CHUNK = 1 << 26  # if each chunk costs an addition to the head's gradient
BLOCK = 1 << 19  # logits whose softmax stays in the cache
TILE = 128  # tokens: with a multiple of it, matmuls are faster


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
    losses = []
    hits = []
    for rows in chunks(len(h), len(w), CHUNK):
        z = linear(h[rows], w)
        hits.append(z.argmax(-1) == targets[rows])
        losses.append(to_gradient(z, targets[rows]))
        del z  # its memory is the next one's
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


def to_gradient(z: Tensor, targets: Tensor) -> Tensor:
    """Replace z (n, V) by dL/dz = softmax(z) - onehot(target), and return the losses, fp32 (n,):
    L = logsumexp(z) - z[target].

    On a CPU a few rows at a time, so that what is read and written several times stays in its
    cache.
    """
    n, V = z.shape
    size = n
    if z.device.type == "cpu":
        size = max(1, BLOCK // V)
    losses = []
    for rows, y in zip(z.split(size), targets[:, None].split(size), strict=True):
        z_max = rows.amax(-1, keepdim=True).float()
        z_at_target = rows.gather(1, y)
        p = torch.softmax(rows, -1, dtype=torch.float32)
        log_sum_exp = z_max - p.amax(-1, keepdim=True).log()  # since max p = exp(z_max) / sum exp
        losses.append((log_sum_exp - z_at_target).squeeze(1))
        p.scatter_add_(1, y, -torch.ones_like(p[:, :1]))
        rows.copy_(p)
    return torch.cat(losses)


class _TiedCrossEntropy(cuda_loss.LossAndGradient):
    """Compute the loss and its gradient on a CPU or Apple's GPU.

    With z = W h, dL/dh = dL/dz W and dL/dW = dL/dz^T h. Nothing (N, V) is kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        h = hidden.to(dtype)
        w = weight.to(dtype)
        total = torch.zeros((), device=h.device)
        grad_h = torch.empty_like(h)
        grad_w = None
        logits = CHUNK
        if ctx.needs_input_grad[1]:
            grad_w = weight.new_zeros(weight.T.shape)  # dL/dW^T, since its matmul is faster
            logits = LARGE_CHUNK

        for rows in chunks(len(h), len(w), logits):
            z = linear(h[rows], w)
            total += to_gradient(z, targets[rows]).sum()
            grad_h[rows] = linear(z, w.T)
            if grad_w is not None:
                grad_w += linear(h[rows].T, z.T)
            del z  # its memory is the next one's

        if grad_w is not None:
            grad_w = grad_w.T.contiguous()
        ctx.save_for_backward(grad_h, grad_w)
        return total
