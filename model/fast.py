"""Make a GPT-2 faster: `accelerate(model)`.

Each class here computes what its plain parent does, in another way. `accelerate` gives the modules
of one model these classes; parameters, buffers and names stay as they are.

| replaced | by | why |
|---|---|---|
| `nn.Linear` on a CPU, fp32, not narrow | oneDNN's matmul | it is faster than MKL's |
| `nn.Dropout` on a CPU | four draws from one random word | the generator is the bottleneck |
| attention on a CPU | matmul, softmax, dropout | the fused kernel has no dropout there |
| the loss and the scores | logits in chunks | whole, they would be the largest tensor |

On other devices they call what they replace, the loss excepted; so do, under torch.compile, linear
layers and dropout. The loss on CUDA is in `model/cuda_loss.py`. `python -m benchmarks.operations`
measures what each of them gains (docs/speed.md), and tests/model/test_fast.py holds each to its
parent.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import cuda_loss
from model.gpt2 import GPT2, Attention

NARROW = 64  # a weight with a smaller side, as A and B have, stays MKL's: oneDNN is slower there
LONGEST_MATRIX = 256  # tokens; in low precision, up to here the (T, T) matrix is faster
FEW_LOGITS = 1 << 23  # per chunk, to save memory
MANY_LOGITS = 1 << 25  # if each chunk costs an addition to the head's gradient
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FastLinear(nn.Linear):
    """y = x W^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FastDropout(nn.Dropout):
    """Set each element to 0 with probability p, and scale the others by 1 / (1 - p)."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


class FastAttention(Attention):
    """Causal self-attention; `attend` is `causal_attention`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.attn_pdrop if self.training else 0.0
        return causal_attention(q, k, v, p)


class FastGPT2(GPT2):
    """GPT-2 that computes its logits, in training and scoring, only chunk by chunk."""

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.wte.weight)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return tied_cross_entropy(hidden, self.wte.weight, targets)

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return score(hidden, self.wte.weight, targets)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    nn.Dropout: FastDropout,
    Attention: FastAttention,
    GPT2: FastGPT2,
}


def accelerate(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]] = FAST) -> None:
    """Replace, in this model, each module's class by its fast one. Call it after `inject`."""
    for module in model.modules():
        kind = type(module)
        if kind in classes:
            module.__class__ = classes[kind]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` for 2 or more dimensions: in fp32 on a CPU by oneDNN, if W is wide."""
    fp32_on_cpu = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    cast_or_compiled = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    narrow = min(weight.shape) < NARROW
    if not ONEDNN or not fp32_on_cpu or not x.numel() or narrow or cast_or_compiled:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """Give `_onednn` the gradients that PyTorch does not define, with g = dL/dy."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = g.flatten(0, -2)

        dx = dweight = dbias = None
        if for_x:
            dx = _onednn(g, weight.T)  # dL/dx = g W
        if for_weight:
            dweight = _onednn(rows.T, x.flatten(0, -2).T)  # dL/dW = g^T x
        if for_bias:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Compute `F.dropout`, with other random numbers on a CPU."""
    if not training or p == 0:
        return x
    if p == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():  # one fused kernel there
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    """Draw 16 bits per element, four elements' in a 64-bit word: a quarter of the draws.

    An element is kept for `kept` of the 2^16 values, so that p is rounded to a multiple of 2^-16.
    """

    @staticmethod
    def forward(ctx, x, p):
        kept = round((1 - p) * 2**16)
        kept = min(max(1, kept), 2**16 - 1)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        values = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = values.lt_(kept - 2**15).to(torch.int8)  # 1 or 0; a byte, for the backward pass
        ctx.save_for_backward(keep)
        ctx.scale = 2**16 / kept
        return x * keep.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (keep,) = ctx.saved_tensors
        return g * keep.to(g.dtype).mul_(ctx.scale), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Compute `F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)`.

    All are (B, H, T, D).
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
    if hidden.is_cuda:
        return cuda_loss.score(hidden, weight, targets, dtype)
    h = hidden.to(dtype)
    w = weight.to(dtype)
    losses = []
    hits = []
    for chunk in _head_chunks(h, w, targets):
        losses.append(chunk.losses)
        hits.append(chunk.z.argmax(-1) == chunk.targets)
    return torch.cat(losses), torch.cat(hits)


def tied_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")` in fp32, nats.

    hidden (N, C), weight (V, C), targets (N,). The logits (N, V) are computed in chunks; matmuls
    run in autocast's precision, the softmax in fp32.
    """
    kind = cuda_loss.TiedCrossEntropy if hidden.is_cuda else _TiedCrossEntropy
    return kind.apply(hidden, weight, targets, _compute_dtype(hidden))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class HeadChunk(NamedTuple):
    """The head's results for n of the tokens."""

    h: Tensor  # hidden states (n, C)
    targets: Tensor  # (n,)
    z: Tensor  # logits (n, V)
    p: Tensor  # softmax(z), fp32 (n, V)
    losses: Tensor  # -log p(target), fp32 (n,)


def _head_chunks(h: Tensor, w: Tensor, targets: Tensor, large: bool = False) -> Iterator[HeadChunk]:
    """Compute the head chunk by chunk."""
    logits_at_a_time = MANY_LOGITS if large else FEW_LOGITS
    chunks = max(1, math.ceil(len(h) * len(w) / logits_at_a_time))
    # One buffer for every p: fresh memory of this size would cost a page fault every 4 KiB.
    p_buffer = torch.empty(math.ceil(len(h) / chunks), len(w), device=h.device)

    for h_rows, y in zip(h.chunk(chunks), targets.chunk(chunks), strict=True):
        z = linear(h_rows, w)
        p = torch.softmax(z, -1, dtype=torch.float32, out=p_buffer[: len(y)])
        log_sum_exp = z.amax(-1).float() - p.amax(-1).log()  # since max p = exp(max z) / sum exp(z)
        z_at_target = z.gather(1, y[:, None]).squeeze(1)
        yield HeadChunk(h_rows, y, z, p, log_sum_exp - z_at_target)


class _TiedCrossEntropy(cuda_loss.LossAndGradient):
    """Compute the loss and its gradient on a CPU or Apple's GPU.

    With z = W h and p = softmax(z), a token's loss is L = logsumexp(z) - z[target], so that
    dL/dz = p - onehot(target), dL/dh = dL/dz W and dL/dW = dL/dz^T h. Nothing (N, V) is kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        h = hidden.to(dtype)
        w = weight.to(dtype)
        total = torch.zeros((), device=h.device)
        grad_h = []
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

        for chunk in _head_chunks(h, w, targets, large=grad_w is not None):
            total += chunk.losses.sum()
            minus_ones = -chunk.p.new_ones(len(chunk.targets), 1)
            grad_z = chunk.p.scatter_add_(1, chunk.targets[:, None], minus_ones)  # p - onehot
            if grad_z.dtype != w.dtype:
                grad_z = chunk.z.copy_(grad_z)  # reuse z's memory
            grad_h.append(linear(grad_z, w.T))
            if grad_w is not None:
                grad_w += linear(grad_z.T, chunk.h.T)

        ctx.save_for_backward(torch.cat(grad_h), grad_w)
        return total
