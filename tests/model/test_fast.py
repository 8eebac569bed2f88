"""Compare the fast operations with PyTorch's: values, gradients, statistics, memory."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.inject import inject
from model.gpt2 import GPT2, IGNORE_INDEX, GPT2Config
from model.kernels import cpu as ops
from model.kernels import loss as head
from model.kernels.fast import FastDropout, set_kernels
from tests.helpers import DEVICE, Operations

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 2e-6 if DEVICE == "cpu" else 5e-5, BF16: 2e-2, FP16: 3e-3}


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def normal(*shape: int, seed: int = 0, dtype=FP32, strided=False) -> Tensor:
    """Return a tensor of N(0, 1) with a gradient. `strided` gives a transposed view."""
    generator = torch.Generator().manual_seed(seed)
    if strided:
        x = torch.randn(shape[::-1], generator=generator).to(DEVICE, dtype).requires_grad_()
        return x.permute(*reversed(range(x.ndim)))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


def assert_same(fast, plain, *inputs: Tensor, strided=False) -> Tensor:
    """Compare values and gradients of `fast` with `plain` in fp64. Return `fast`'s value."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    tolerance = TOLERANCE[inputs[0].dtype]
    y = fast(*inputs)
    wanted = plain(*exact)
    assert_close(y, wanted, tolerance)
    grad = normal(*y.shape, seed=9, dtype=y.dtype, strided=strided).detach()
    trained = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(y, trained, grad)
    expected = torch.autograd.grad(wanted, [x for x in exact if x.requires_grad], grad.double())
    for x, got, want in zip(trained, gradients, expected, strict=True):
        assert got.dtype == x.dtype
        assert_close(got, want, 2 * tolerance)
    return y


@pytest.mark.device
@pytest.mark.parametrize(
    ("shape", "dtype", "strided"),
    [
        ((2, 3, 5, 8), FP32, True),
        ((2, 1, 300, 4), BF16, True),
        ((1, 2, 8, 8), FP16, False),
    ],
)
def test_attention_and_its_gradients_are_those_of_pytorch(shape, dtype, strided):
    inputs = (normal(*shape, seed=i, dtype=dtype, strided=strided) for i in range(3))
    y = assert_same(
        lambda *qkv: ops.causal_attention(*qkv, dropout_p=0.0), plain_attention, *inputs
    )
    assert y.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [  # T = D, as `unit` requires
        ((2, 3, 8, 8), FP32),
        ((1, 2, 33, 33), FP16),
    ],
)
def test_attention_with_dropout_and_its_gradients_are_those_of_what_it_drew(shape, dtype):
    q, k, v = (normal(*shape, seed=i, dtype=dtype) for i in range(3))
    unit = torch.eye(shape[2], dtype=dtype).expand(*shape[:2], -1, -1)  # gives the attention matrix

    def drawn(q, k, v):
        torch.manual_seed(0)
        return ops.causal_attention(q, k, v, dropout_p=0.25)

    def plain(q, k, v):
        return (plain_attention(q, k, unit.double()) * kept / 0.75) @ v

    kept = drawn(q, k, unit) != 0
    assert len(kept.flatten(0, 1).unique(dim=0)) == shape[0] * shape[1]  # all heads differ
    assert_same(drawn, plain, q, k, v)


@pytest.mark.parametrize(("p", "dtype"), [(0.05, FP32), (0.9, FP16), (1e-9, FP32)])
def test_dropout_keeps_as_many_as_it_should_and_scales_them(p, dtype):
    torch.manual_seed(0)
    n = 300_003  # not a multiple of 4, the numbers per random word
    y = ops.dropout(torch.ones(n, dtype=dtype), p, training=True)
    kept = y != 0
    p = round(p * 2**16) / 2**16  # p is rounded to these steps
    p = min(max(p, 2**-16), 1 - 2**-16)
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * sigma
    assert y[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=TOLERANCE[dtype])


def test_dropout_draws_are_independent_reproducible_and_also_the_gradients():
    x = normal(64, 1000)
    torch.manual_seed(1)
    y = ops.dropout(x, 0.5, training=True)
    torch.manual_seed(1)
    assert torch.equal(y, ops.dropout(x, 0.5, training=True))
    assert not torch.equal(y, ops.dropout(x, 0.5, training=True))
    y.sum().backward()
    assert torch.equal(x.grad, (y / x).nan_to_num().round())
    kept = (y != 0).double().flatten()
    for lag in (1, 2, 3, 4, 1000):  # within one random word, between words, between rows
        agreement = (kept[lag:] == kept[:-lag]).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / len(kept) ** 0.5


def test_dropout_is_off_in_evaluation_and_at_zero_and_drops_all_at_one():
    x = normal(1 << 18)
    assert ops.dropout(x, 0.5, training=False) is x
    assert ops.dropout(x, 0.0, training=True) is x
    y = ops.dropout(x, 1.0, training=True)
    y.sum().backward()
    assert not y.any() and not x.grad.any()


@pytest.mark.device
@pytest.mark.parametrize(
    ("N", "C", "V", "chunk", "frozen", "dtype"),
    [
        (16, 16, 16, 100, False, FP32),
        (33, 16, 101, 1000, True, FP32),
        (33, 16, 101, 1000, False, BF16),
        (64, 16, 101, 1, True, FP16),
        (50, 8, 257, 10**9, False, FP16),
    ],
)
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, N, C, V, chunk, frozen, dtype):
    monkeypatch.setattr(head, "CHUNK" if frozen else "LARGE_CHUNK", chunk)
    monkeypatch.setattr(head, "SLICE_BYTES", 64)  # bytes: splits the vocabulary
    hidden = normal(N, C, seed=1, dtype=dtype)
    weight = normal(V, C, seed=2, dtype=dtype).requires_grad_(not frozen)
    targets = (torch.arange(N, device=DEVICE) * 7) % V

    def fast(h, w):
        return head.tied_cross_entropy(h, w, targets)

    def plain(h, w):
        return F.cross_entropy(h @ w.T, targets, reduction="sum")

    loss = assert_same(fast, plain, hidden, weight)
    assert loss.dtype == FP32


def test_autocast_rules_the_precision_of_matmuls_and_not_of_the_softmax():
    hidden = normal(9, 16, seed=1)
    weight = normal(33, 16, seed=2)
    targets = torch.arange(9)
    low = [x.detach().bfloat16() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype=BF16):
        loss = head.tied_cross_entropy(hidden, weight, targets)
        scores = head.token_losses(hidden, weight, targets)
        losses = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
        assert_close(loss, losses.sum(), 1e-6)
        assert_close(scores[0], losses, 1e-6)
    assert torch.equal(loss, head.tied_cross_entropy(*low, targets)) and loss.dtype == FP32
    assert torch.equal(scores[0], head.token_losses(*low, targets)[0])
    assert not torch.equal(scores[0], head.token_losses(hidden, weight, targets)[0])


@pytest.mark.device
def test_loss_is_right_where_a_probability_underflows_and_shows_what_is_not_a_number():
    hidden = torch.tensor([[200.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    targets = torch.ones(1, dtype=torch.int64, device=DEVICE)
    loss = head.tied_cross_entropy(hidden, weight, targets)
    assert loss.item() == pytest.approx(400)
    assert torch.autograd.grad(loss, hidden)[0].item() == pytest.approx(2)
    assert head.tied_cross_entropy(hidden * torch.nan, weight, targets).isnan()
    twice = torch.cat([hidden, hidden])  # a certain token, and one whose probability underflows
    targets = torch.arange(2, device=DEVICE)
    assert head.tied_cross_entropy(twice, weight, targets).item() == pytest.approx(400)


def test_the_slices_of_a_gradient_are_added_in_fp32(monkeypatch):
    """In bf16, a sum of 1/1024 would not grow beyond 1/4."""
    monkeypatch.setattr(head, "SLICE_BYTES", 2)  # a slice for each of 1,024 tokens
    hidden = torch.zeros(1, 1, dtype=BF16, requires_grad=True)
    weight = torch.ones(1024, 1, dtype=BF16)
    weight[0] = 0
    head.tied_cross_entropy(hidden, weight, torch.zeros(1, dtype=torch.int64)).backward()
    assert hidden.grad.item() == pytest.approx(1023 / 1024, rel=0.01)


@pytest.mark.device
@pytest.mark.parametrize("chunk", [1, 20])
def test_scores_are_those_of_cross_entropy_and_argmax(monkeypatch, chunk):
    monkeypatch.setattr(head, "CHUNK", chunk)
    hidden = normal(30, 8, seed=1)
    weight = normal(13, 8, seed=2)
    logits = (hidden @ weight.T).detach()
    numbers = torch.arange(30, device=DEVICE)
    targets = torch.where(numbers % 2 == 0, logits.argmax(-1), numbers % 13)
    losses, hits = head.token_losses(hidden, weight, targets)
    assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), 1e-6)
    assert torch.equal(hits, logits.argmax(-1) == targets) and 15 <= hits.sum() < 30


@pytest.mark.parametrize("gradient", [True, False])
def test_the_logits_of_a_batch_are_never_whole(monkeypatch, gradient):
    """No intermediate tensor is as large as (N, V)."""
    monkeypatch.setattr(head, "CHUNK", 4096)
    hidden = normal(512, 8, seed=1).requires_grad_(gradient)
    weight = normal(1024, 8).detach()
    targets = torch.zeros(512, dtype=torch.int64)
    with Operations() as operations:
        if gradient:
            head.tied_cross_entropy(hidden, weight, targets).backward()
        else:
            head.token_losses(hidden, weight, targets)
    assert 4096 * 4 <= operations.largest < 512 * 1024 * 4 / 8


@pytest.mark.device
@pytest.mark.parametrize("attn_pdrop", [0.0, 0.25])
def test_fast_kernels_replace_what_one_model_computes_and_nothing_else(monkeypatch, attn_pdrop):
    """Values and gradients equal the plain model. Dropouts draw other numbers."""
    config = GPT2Config(
        vocab_size=101, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=attn_pdrop
    )
    torch.manual_seed(0)
    model = GPT2(config).to(DEVICE)
    inject(model, LoRAConfig(r=4))
    nn.init.normal_(model.h[0].attn.c_attn.lora_B.weight)
    fast = deepcopy(model).eval()
    set_kernels(fast, "fast")
    assert not any(m.training for m in fast.modules())  # as before, so no dropout appears
    assert not any(type(m) is nn.Dropout for m in fast.modules())
    assert not any(type(m) is FastDropout for m in model.modules())  # the other is unchanged
    assert fast.state_dict().keys() == model.state_dict().keys()

    ids = torch.arange(32, device=DEVICE).view(2, 16)
    targets = ids.clone()
    targets[0, 3:9] = IGNORE_INDEX
    for each in (model.eval(), fast.eval()):
        each.loss(ids, targets).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), fast.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and p.grad.any():
            assert_close(q.grad, p.grad.double(), 1e-5)
    assert_close(fast(ids), model(ids).double(), 1e-5)
    for ours, theirs in zip(
        fast.token_losses(ids, targets), model.token_losses(ids, targets), strict=True
    ):
        assert_close(ours.double(), theirs.double(), 1e-5)
        assert not ours[targets == IGNORE_INDEX].any()

    for is_cpu in (DEVICE == "cpu", False):  # except on a CPU, both use PyTorch's dropout
        monkeypatch.setattr(ops, "is_faster_here", lambda x, is_cpu=is_cpu: is_cpu)
        drawn = []
        for each in (model.train(), fast.train()):
            torch.manual_seed(3)
            drawn.append(each(ids))
        assert torch.equal(*drawn) != is_cpu
