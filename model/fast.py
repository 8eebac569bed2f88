"""Faster twins of the operations in `model/plain.py`, which says what each of them computes.

- `linear`: oneDNN's matmul in place of MKL's, in fp32.
- `dropout`: a quarter of the random numbers that `F.dropout` draws.
- `causal_attention`: matmul, softmax, dropout, matmul; the fused kernel has no dropout on a CPU.
- `tied_cross_entropy`, `score`: the logits are never whole, and no matmul is done twice.
- `Embedding`: draws no weights; on the meta device that would import PyTorch's compiler.

The first three are for the CPU; elsewhere they call what they replace. `python -m
benchmarks.operations` measures what each operation gains (docs/speed.md).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST_MATRIX = 256  # tokens; in low precision, up to here the (T, T) matrix is faster
FEW_LOGITS = 1 << 23  # per chunk, to save memory
MANY_LOGITS = 1 << 25  # if each chunk costs kernel launches or an addition to the head's gradient
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` for x of 2 or more dimensions."""
    fp32_on_cpu = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    cast_or_compiled = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if not (ONEDNN and fp32_on_cpu and x.numel()) or cast_or_compiled:
        return F.linear(x, weight, bias)
    return (_OneDNNLinear.apply if torch.is_grad_enabled() else _onednn)(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """Give `_onednn` the gradients that PyTorch does not define."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # g = dL/dy
        return (
            _onednn(grad, weight.T) if for_x else None,  # dL/dx = g W
            _onednn(rows.T, x.flatten(0, -2).T) if for_weight else None,  # dL/dW = g^T x
            rows.sum(0) if for_bias else None,
        )


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Draw nothing: `GPT2.init_weights` does."""


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Compute `F.dropout`, with other random numbers."""
    if not training or p == 0:
        return x
    if p == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():  # one fused kernel there
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


class _Dropout(torch.autograd.Function):
    """Draw 16 bits per element, four in a 64-bit word: on a CPU dropout waits for the generator."""

    @staticmethod
    def forward(ctx, x, p):
        kept = min(max(1, round((1 - p) * 2**16)), 2**16 - 1)  # of 2^16 values: p is rounded
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        values = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = values.lt_(kept - 2**15).to(torch.int8)  # 1 or 0; a byte, for the backward pass
        ctx.save_for_backward(keep)
        ctx.scale = 2**16 / kept
        return x * keep.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return grad * keep.to(grad.dtype).mul_(ctx.scale), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Compute `F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)`; all are
    (B, H, T, D).
    """
    B, H, T, D = q.shape
    # On a CPU the fused kernel has no dropout, and is slow in low precision while T is small.
    fused_is_faster = p == 0 and (q.dtype == torch.float32 or T > LONGEST_MATRIX)
    if q.device.type != "cpu" or fused_is_faster:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)  # (T, T)
    scores = torch.baddbmm(mask.expand(B * H, T, T), q, k.mT, alpha=1 / math.sqrt(D))
    weights = dropout(scores.softmax(-1), p, training=True)  # (B * H, T, T)
    return (weights @ v).view(B, H, T, D)


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(target), nats, fp32 (N,), and whether the target is the likeliest, bool (N,).

    hidden (N, C), weight (V, C), targets (N,). The logits (N, V) are computed in chunks.
    """
    dtype = _compute_dtype(hidden)
    losses, hits = [], []
    w = _pad_on_cuda(weight.to(dtype))
    for _, y, z, _, loss in _head_chunks(hidden.to(dtype), w, targets, len(weight)):
        losses.append(loss)
        hits.append(z.argmax(-1) == y)
    return torch.cat(losses), torch.cat(hits)


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")` in fp32, nats.

    hidden (N, C), weight (V, C), targets (N,). The logits (N, V) are computed in chunks; matmuls
    run in autocast's precision, the softmax in fp32.
    """
    return _TiedCrossEntropy.apply(hidden, weight, targets, _compute_dtype(hidden))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _pad_on_cuda(w: Tensor) -> Tensor:
    """Add rows of 0 up to a multiple of 64: GPT-2's 50,257 is odd, and its matmuls unaligned."""
    return F.pad(w, (0, 0, 0, -len(w) % 64)) if w.is_cuda else w


def _head_chunks(
    h: Tensor, w: Tensor, targets: Tensor, vocab_size: int, large: bool = False
) -> Iterator[tuple]:
    """Yield chunks of n tokens: h (n, C), targets (n,), logits z and fp32 softmax p (n, V), loss
    (n,). In columns from `vocab_size` on, z is -inf and p is 0.
    """
    at_a_time = MANY_LOGITS if large or h.is_cuda else FEW_LOGITS
    chunks = math.ceil(len(h) * len(w) / at_a_time) or 1
    # One buffer for every p: fresh memory of this size would cost a page fault every 4 KiB.
    p_buffer = torch.empty(math.ceil(len(h) / chunks), len(w), device=h.device)
    for h_rows, y in zip(h.chunk(chunks), targets.chunk(chunks), strict=True):
        z = linear(h_rows, w)
        if len(w) > vocab_size:
            z[:, vocab_size:].fill_(-math.inf)
        p = torch.softmax(z, -1, dtype=torch.float32, out=p_buffer[: len(y)])
        at_target = z.gather(1, y[:, None]).squeeze(1)
        log_sum_exp = z.amax(-1).float() - p.amax(-1).log()  # since max p = exp(max z) / sum exp(z)
        yield h_rows, y, z, p, log_sum_exp - at_target


class _TiedCrossEntropy(torch.autograd.Function):
    """Compute the gradient in the forward pass: the loss comes last, so dL is only a factor.

    With z = W h and p = softmax(z), a token's loss is L = logsumexp(z) - z[target], so that
    dL/dz = p - onehot(target), dL/dh = dL/dz W and dL/dW = dL/dz^T h. Nothing (N, V) is kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        h, w = hidden.to(dtype), _pad_on_cuda(weight.to(dtype))
        grad_h = []
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=h.device)
        large = grad_w is not None
        for h_rows, y, z, p, loss in _head_chunks(h, w, targets, len(weight), large):
            total += loss.sum()
            grad_z = p.scatter_add_(1, y[:, None], -p.new_ones(len(y), 1))  # p - onehot(target)
            grad_z = grad_z if grad_z.dtype == w.dtype else z.copy_(grad_z)  # z is done with
            grad_h.append(linear(grad_z, w.T))
            if grad_w is not None:
                grad_w += linear(grad_z.T, h_rows.T)[: len(weight)]
        ctx.save_for_backward(torch.cat(grad_h), grad_w)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, None if grad_w is None else grad_w * grad, None, None
