"""Products, dropout, attention and loss: what PyTorch has as single calls, written here for speed.

Each computes what its PyTorch counterpart does; benchmarks/plain.py holds the pairs, and the tests
compare them. Everything else in the model is PyTorch's own.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST_PRODUCTS = 256  # tokens, up to which low precision is faster with the matrix written out
FEW_LOGITS = 1 << 23  # at a time, where memory counts
MANY_LOGITS = 1 << 25  # where every chunk costs: a GPU's launches, a sum into the head's gradient
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, for x (..., in) of two dimensions or more. In fp32 on a CPU by oneDNN, where
    PyTorch would take MKL: faster, most of all for a single token and for a short, wide result.
    """
    fp32_on_cpu = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    cast_or_compiled = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if not (ONEDNN and fp32_on_cpu) or cast_or_compiled:
        return F.linear(x, weight, bias)
    return (_OneDNNLinear.apply if torch.is_grad_enabled() else _onednn)(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """`_onednn`, which has no gradient of its own. With g = dL/dy: dL/dx = g W, dL/dW = g^T x, and
    dL/db is the sum of g's rows. For dL/dW oneDNN would copy both factors, and gain nothing.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (_onednn(grad, weight.T) if for_x else None,
                rows.T @ x.flatten(0, -2) if for_weight else None,
                rows.sum(0) if for_bias else None)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`: each element is 0 with probability p, else x / (1 - p)."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # one fused kernel there
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


class _Dropout(torch.autograd.Function):
    """Draws fewer random words, and keeps a byte an element for the backward pass.

    The generator is what dropout waits for on a CPU: one random 64-bit word decides four
    elements, 16 bits each. p is therefore a multiple of 2^-16, and the scale is that p's.
    """

    @staticmethod
    def forward(ctx, x, p):
        kept = min(max(1, round((1 - p) * 2**16)), 2**16 - 1)  # of 2^16 values
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        values = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = values.lt_(kept - 2**15).to(torch.int8)  # 1 or 0
        ctx.save_for_backward(keep)
        ctx.scale = 2**16 / kept
        return x * keep.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        keep, = ctx.saved_tensors
        return grad * keep.to(grad.dtype).mul_(ctx.scale), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """`F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)`; (B, H, T, D) all.

    softmax(q k^T / sqrt(D) + mask) v. On a CPU the fused kernel knows no dropout, and is slow in
    low precision while the (T, T) matrix is small: the two products and the softmax one by one.
    """
    B, H, T, D = q.shape
    fused_is_faster = p == 0 and (q.dtype == torch.float32 or T > LONGEST_PRODUCTS)
    if q.device.type != "cpu" or fused_is_faster:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)  # (T, T)
    scores = torch.baddbmm(mask.expand(B * H, T, T), q, k.mT, alpha=1 / math.sqrt(D))
    weights = dropout(scores.softmax(-1), p, training=True)  # (B * H, T, T)
    return (weights @ v).view(B, H, T, D)


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target), nats, fp32 (N,), and whether the target is the likeliest token, bool (N,).

    hidden (N, C), weight (V, C), targets (N,); the logits, (N, V), are never whole.
    """
    dtype = _compute_dtype(hidden)
    losses, hits = [], []
    for _, y, z, _, loss in _head_chunks(hidden.to(dtype), weight.to(dtype), targets):
        losses.append(loss)
        hits.append(z.argmax(-1) == y)
    return torch.cat(losses), torch.cat(hits)


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy(hidden @ weight.T, targets, reduction="sum")` in fp32, nats.

    hidden (N, C), weight (V, C), targets (N,); the logits, (N, V), are never whole. Products run
    in autocast's precision, the softmax in fp32.
    """
    return _TiedCrossEntropy.apply(hidden, weight, targets, _compute_dtype(hidden))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _head_chunks(h: Tensor, w: Tensor, targets: Tensor, large: bool = False) -> Iterator[tuple]:
    """Chunks of rows: h (n, C), targets (n,), logits z (n, V), softmax p (n, V) fp32, loss (n,).

    loss = logsumexp(z) - z[target], and logsumexp(z) = max z - log max p. The next chunk overwrites
    p: fresh memory of this size would cost a page fault every 4 KB.
    """
    at_a_time = MANY_LOGITS if large or h.is_cuda else FEW_LOGITS
    chunks = math.ceil(len(h) * len(w) / at_a_time) or 1
    p_buffer = torch.empty(math.ceil(len(h) / chunks), len(w), device=h.device)
    for h_rows, y in zip(h.chunk(chunks), targets.chunk(chunks), strict=True):
        z = linear(h_rows, w)
        p = torch.softmax(z, -1, dtype=torch.float32, out=p_buffer[: len(y)])
        at_target = z.gather(1, y.clamp(min=0)[:, None]).squeeze(1)
        yield h_rows, y, z, p, z.amax(-1).float() - p.amax(-1).log() - at_target


class _TiedCrossEntropy(torch.autograd.Function):
    """The loss comes last, so its gradient is known up to a factor while the logits are there.

    With z = W h and p = softmax(z), one token's loss is L = logsumexp(z) - z[target], so that
    dL/dz = p - onehot(target), dL/dh = (p - onehot) W and dL/dW = (p - onehot)^T h: three products
    in all, two where W is frozen, and nothing of size (N, V) is kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        h, w = hidden.to(dtype), weight.to(dtype)
        grad_h = []
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=h.device)
        for h_rows, y, z, p, loss in _head_chunks(h, w, targets, large=grad_w is not None):
            total += loss.sum()
            p.scatter_add_(1, y[:, None], -p.new_ones(len(y), 1))  # dL/dz
            p = p if w.dtype == p.dtype else z.copy_(p)
            grad_h.append(linear(p, w.T))
            if grad_w is not None:
                grad_w += p.T @ h_rows
        ctx.save_for_backward(torch.cat(grad_h), grad_w)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, None if grad_w is None else grad_w * grad, None, None
