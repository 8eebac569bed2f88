"""The training loss and the token losses of a tied head on a CUDA GPU.

This file differs from `model/kernels/loss.py` in three ways. First, rows of 0 extend the head to a
multiple of 64 rows, because matmuls with an odd vocabulary such as GPT-2's 50,257 are slow. Second,
fewer kernels run, because each kernel costs a launch and a pass over the logits. Third, in low
precision the logits stay in fp32, and the gradient of `hidden` is rounded.

Shapes: hidden (N, C), weight (V, C), targets (N,), logits (n, W), where W is V rounded up to a
multiple of 64.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt2 import IGNORE_INDEX
from model.kernels.loss import LossAndGradient, compute_dtype

ALIGNED = 64
SHARE = 64  # a chunk of logits takes at most 1/64 of the card's memory


def aligned(rows: int) -> int:
    """Round up to a multiple of 64."""
    return rows + -rows % ALIGNED


def aligned_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a detached copy of weight (V, C) in `dtype`, with rows of zeros up to (W, C), where W
    is `aligned(V)`."""
    rows = aligned(len(weight)) - len(weight)
    return F.pad(weight.detach().to(dtype), (0, 0, 0, rows))


def card_memory(device: torch.device) -> int:
    """Return the card's total memory in bytes. The free memory would not do, because it differs
    from run to run."""
    return torch.cuda.get_device_properties(device).total_memory


def logits(h: Tensor, w: Tensor) -> Tensor:
    """Return h w^T in fp32. cuBLAS sums bf16 and fp16 in fp32, so no cast is needed. PyTorch for
    ROCm also calls its devices cuda, but some versions lack `out_dtype`.
    """
    if h.is_cuda and not torch.version.hip and h.dtype != torch.float32:
        return torch.mm(h, w.T, out_dtype=torch.float32)
    return (h @ w.T).float()


def head_chunks(
    h: Tensor, w: Tensor, targets: Tensor, vocab_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk, yield the rows, the targets (n, 1) and log_softmax(logits), fp32 (n, W).

    The log softmax is -inf in the columns that belong to the rows added to the head.
    """
    bytes_a_token = 2 * 4 * len(w)  # the logits and the log softmax
    most = max(1, card_memory(h.device) // SHARE // bytes_a_token)
    size = math.ceil(len(h) / math.ceil(len(h) / most))
    for start in range(0, len(h), size):
        rows = slice(start, start + size)
        z = logits(h[rows], w)
        if len(w) > vocab_size:
            z[:, vocab_size:].fill_(-math.inf)
        log_p = torch.log_softmax(z, -1)
        del z  # frees memory for the next chunk
        yield rows, targets[rows, None], log_p
        del log_p  # the caller deletes the tensor too, so the next chunk finds its memory free


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `token_losses` of `model/kernels/loss.py`."""
    dtype = compute_dtype(hidden)
    h = hidden.to(dtype)
    w = aligned_head(weight, dtype)
    losses = []
    likeliest = []
    for _, y, log_p in head_chunks(h, w, targets.clamp(min=0), len(weight)):
        losses.append(-log_p.gather(1, y).squeeze(1))
        likeliest.append(log_p.argmax(-1))
        del log_p
    ignored = targets == IGNORE_INDEX
    return torch.cat(losses).masked_fill(ignored, 0), torch.cat(likeliest) == targets


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute `tied_cross_entropy` of `model/kernels/loss.py`. Ignored rows are kept, because
    selecting the scored rows would make the CPU wait for the GPU.
    """
    return _TiedCrossEntropy.apply(hidden, weight, targets, compute_dtype(hidden))


class _TiedCrossEntropy(LossAndGradient):
    """Compute the loss and its gradient, with matmuls in `dtype`.

    A token's loss is L = -log p[target] with p = softmax(z), so that dL/dz = p - onehot(target),
    dL/dh = dL/dz W and dL/dW = (dL/dz)^T h.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        ignored = (targets == IGNORE_INDEX)[:, None]  # (N, 1)
        h = hidden.to(dtype).masked_fill(ignored, 0)  # ignored rows add nothing to dL/dW
        w = aligned_head(weight, dtype)
        log_p_of_targets = torch.empty(len(h), 1, device=h.device)  # fp32
        grad_h = torch.empty_like(h)
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

        for rows, y, log_p in head_chunks(h, w, targets.clamp(min=0), len(weight)):
            of_targets = torch.gather(log_p, 1, y, out=log_p_of_targets[rows])
            grad_z = log_p if dtype == log_p.dtype else torch.empty_like(log_p, dtype=dtype)
            torch.exp(log_p, out=grad_z)  # p
            # p - 1 is expm1(log p). In low precision, p - 1 would lose digits for p near 1.
            grad_z.scatter_(1, y, of_targets.expm1().to(dtype))
            torch.mm(grad_z, w, out=grad_h[rows])
            if grad_w is not None:
                grad_w += (grad_z.T @ h[rows])[: len(weight)]
            del log_p, grad_z

        ctx.save_for_backward(grad_h.masked_fill_(ignored, 0), grad_w)
        return -log_p_of_targets.masked_fill_(ignored, 0).sum()
