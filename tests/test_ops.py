"""The operations written for speed are PyTorch's own: values, gradients, statistics, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from model import ops

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # and their tolerance
DEVICES = [pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                         reason="no CUDA")), "cpu"]


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def normal(*shape: int, seed: int = 0, device="cpu", dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 5, 8), (1, 2, 33, 16), (2, 1, 300, 4)])
def test_attention_and_its_gradients_are_those_of_pytorch_in_double(shape, dtype, device):
    inputs = [normal(*shape, seed=i, device=device, dtype=dtype) for i in range(3)]
    y = ops.causal_attention(*inputs, p=0.0)
    grad = normal(*shape, seed=3, device=device, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = plain.causal_attention(*exact, p=0.0)
    assert y.dtype == dtype and relative(y, wanted) < DTYPES[dtype]
    for got, want in zip(torch.autograd.grad(y, inputs, grad),
                         torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert (got - want).abs().max() < 3 * DTYPES[dtype] * max(1, want.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 33, 33)])  # T = D, for `unit`
def test_attention_with_dropout_and_its_gradients_are_those_of_what_it_drew(shape, dtype):
    inputs = [normal(*shape, seed=i, dtype=dtype) for i in range(3)]
    torch.manual_seed(0)
    y = ops.causal_attention(*inputs, p=0.25)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    unit = torch.eye(shape[2], dtype=dtype).expand(*shape[:2], -1, -1)  # the result: the matrix
    torch.manual_seed(0)
    kept = ops.causal_attention(*inputs[:2], unit, p=0.25) != 0
    weights = plain.causal_attention(*exact[:2], unit.double(), p=0.0)
    wanted = (weights * kept / 0.75) @ exact[2]
    assert relative(y, wanted) < 2 * DTYPES[dtype]
    grad = normal(*shape, seed=3, dtype=dtype)
    for got, want in zip(torch.autograd.grad(y, inputs, grad),
                         torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert (got - want).abs().max() < 4 * DTYPES[dtype] * max(1, want.abs().max())


def test_attention_over_a_long_context_drops_as_over_a_short_one():
    q, k = normal(1, 1, 300, 300, seed=1), normal(1, 1, 300, 300, seed=2)
    drawn = ops.causal_attention(q, k, torch.eye(300)[None, None], p=0.25)[0, 0].tril()
    share = (drawn == 0).sum() - 300 * 299 // 2
    assert abs(share / (300 * 301 // 2) - 0.25) < 0.02


def test_attention_drops_weights_and_keeps_their_mean():
    q, k = normal(1, 1, 16, 16, seed=1), normal(1, 1, 16, 16, seed=2)
    v = torch.eye(16)[None, None]  # the result is the attention matrix itself
    torch.manual_seed(0)
    drawn = torch.stack([ops.causal_attention(q, k, v, p=0.25) for _ in range(4000)]).detach()
    weights = plain.causal_attention(q, k, v, p=0.0).detach()
    seen = weights > 0
    assert ((drawn == 0).float().mean(0)[seen] - 0.25).abs().max() < 0.035  # 5 sigma
    assert (drawn.mean(0) / weights)[seen].sub(1).abs().max() < 0.05
    assert (drawn[:, ~seen] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9, 1e-9, 0.99])
def test_dropout_keeps_as_many_as_it_should_and_scales_them(p, dtype):
    torch.manual_seed(0)
    n = 1_000_003  # not a multiple of the four that one random word decides
    y = ops.dropout(torch.ones(n, dtype=dtype), p, training=True)
    kept = y != 0
    p = min(max(p, 2**-16), 1 - 2**-16)  # it is drawn in steps of 2^-16
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * sigma + 2**-17
    assert y[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=5e-3)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_keeps_one_byte_an_element_for_its_gradient(dtype):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        ops.dropout(normal(64, 1000, dtype=dtype), 0.5, training=True)
    assert sum(tensor.nbytes for tensor in saved) == 64_000


def test_dropout_is_off_in_evaluation_and_at_zero():
    x = normal(100)
    assert ops.dropout(x, 0.5, training=False) is x and ops.dropout(x, 0.0, training=True) is x
    assert (ops.dropout(x, 0.5, training=True) == 0).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, C, V, chunk", [(1, 4, 7, 7), (5, 8, 11, 11), (33, 16, 101, 1000),
                                            (64, 16, 101, 1), (50, 8, 257, 10**9)])
@pytest.mark.parametrize("frozen", [True, False])
def test_loss_and_gradients_are_those_of_cross_entropy(
        monkeypatch, N, C, V, chunk, frozen, dtype, device):
    monkeypatch.setattr(ops, "FEW_LOGITS" if frozen else "MANY_LOGITS", chunk)
    hidden = normal(N, C, seed=1, device=device, dtype=dtype)
    weight = normal(V, C, seed=2, device=device, dtype=dtype).requires_grad_(not frozen)
    targets = (torch.arange(N, device=device) * 7) % V
    inputs = [hidden] if frozen else [hidden, weight]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)]
    wanted = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    loss = ops.tied_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32 and relative(loss, wanted) < DTYPES[dtype]
    for got, want in zip(torch.autograd.grad(loss / N, inputs),
                         torch.autograd.grad(wanted / N, exact[: len(inputs)]), strict=True):
        assert got.dtype == dtype and relative(got, want) < 2 * DTYPES[dtype]


def test_loss_is_finite_and_right_where_a_probability_underflows():
    hidden, weight = torch.tensor([[200.0]]).requires_grad_(), torch.tensor([[1.0], [-1.0]])
    loss = ops.tied_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(400)
    assert torch.autograd.grad(loss, hidden)[0].item() == pytest.approx(2)


def test_a_number_that_is_not_finite_shows_in_the_loss():
    hidden, weight = normal(3, 4), normal(5, 4)
    with torch.no_grad():
        hidden[1, 2] = torch.nan
    assert ops.tied_cross_entropy(hidden, weight, torch.tensor([0, 1, 2])).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 24), (3, 24), (1, 5, 24), (0, 24)])
def test_products_of_one_token_and_of_many_are_those_of_linear(shape, bias, dtype):
    x, weight, b = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate((shape, (7, 24), (7,))))
    wanted = F.linear(x.double(), weight.double(), b.double() if bias else None)
    y = ops.linear(x, weight, b if bias else None)
    with torch.no_grad():
        z = ops.linear(x, weight, b if bias else None)
    assert y.requires_grad and not z.requires_grad
    for got in (y, z):
        assert got.shape == wanted.shape and got.dtype == dtype
        assert ((got - wanted).abs() < 20 * DTYPES[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 5, 24), (0, 24)])
def test_gradients_of_products_are_those_of_linear(shape, frozen, dtype):
    inputs = [normal(*s, seed=i, dtype=dtype) for i, s in enumerate((shape, (7, 24), (7,)))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = normal(*reversed(shape[:-1]), 7, seed=3, dtype=dtype).transpose(0, len(shape) - 2)
    wanted = torch.autograd.grad(F.linear(*exact), exact, grad.double())
    for x in inputs[1:]:
        x.requires_grad_(not frozen)
    trained = inputs[:1] if frozen else inputs
    got = torch.autograd.grad(ops.linear(*inputs), trained, grad)
    for ours, theirs in zip(got, wanted[: len(trained)], strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert ((ours - theirs).abs() < 20 * DTYPES[dtype]).all()


def test_a_frozen_product_keeps_no_input_for_its_gradient():
    saved, x, weight = [], normal(50, 24), normal(7, 24).detach()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        ops.linear(x, weight)
        assert all(tensor.numel() == weight.numel() for tensor in saved)
        ops.linear(x, weight.requires_grad_())
    assert any(tensor.numel() == x.numel() for tensor in saved)


@pytest.mark.parametrize("chunk", [1, 20, 1000])
def test_scores_are_those_of_cross_entropy_and_argmax(monkeypatch, chunk):
    monkeypatch.setattr(ops, "FEW_LOGITS", chunk)
    hidden, weight = normal(30, 8, seed=1), normal(13, 8, seed=2)
    logits = (hidden @ weight.T).detach()
    targets = torch.where(torch.arange(30) % 2 == 0, logits.argmax(-1), torch.arange(30) % 13)
    losses, hits = ops.score(hidden, weight, targets)
    assert relative(losses, F.cross_entropy(logits, targets, reduction="none")) < 1e-6
    assert torch.equal(hits, logits.argmax(-1) == targets) and 15 <= hits.sum() < 30


@pytest.mark.parametrize("gradient", [True, False])
def test_the_logits_of_a_batch_are_never_whole(monkeypatch, gradient):
    """No tensor that is made on the way is as large as (N, V)."""
    monkeypatch.setattr(ops, "FEW_LOGITS", 4096)
    hidden, weight = normal(512, 8, seed=1).requires_grad_(gradient), normal(1024, 8).detach()
    targets = torch.zeros(512, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        if gradient:
            ops.tied_cross_entropy(hidden, weight, targets).backward()
        else:
            ops.score(hidden, weight, targets)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 4096 * 4 <= largest < 512 * 1024 * 4 / 8
