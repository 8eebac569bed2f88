"""Compare CUDA's loss and scores with PyTorch's functions. On a CPU, CUDA's code runs there."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt2 import IGNORE_INDEX
from model.kernels import cuda_loss
from tests.helpers import DEVICE
from tests.model.test_fast import BF16, FP16, FP32, TOLERANCE, assert_close, assert_same, normal

pytestmark = pytest.mark.device


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """A device with memory for the logits of 20 tokens at a time and 101 words (padded to 128)."""
    memory = 20 * 128 * 8 * cuda_loss.SHARE
    monkeypatch.setattr(cuda_loss, "card_memory", lambda device: memory)


def plain(targets: Tensor):
    return lambda hidden, weight: F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def fast(targets: Tensor):
    return lambda hidden, weight: cuda_loss.tied_cross_entropy(hidden, weight, targets)


def case(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = normal(n, 16, seed=1, dtype=dtype)
    weight = normal(vocab, 16, seed=2, dtype=dtype)
    targets = (torch.arange(n, device=DEVICE) * 7) % vocab
    targets[4::5] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("n", "vocab", "dtype"),
    [
        (1, 7, FP32),
        (20, 64, FP32),
        (33, 101, FP32),
        (33, 101, BF16),
        (33, 128, BF16),
        (5, 101, FP16),
    ],
)
def test_loss_and_gradients_are_those_of_cross_entropy(n, vocab, dtype, frozen):
    hidden, weight, targets = case(n, vocab, dtype)
    weight.requires_grad_(not frozen)
    loss = assert_same(fast(targets), plain(targets), hidden, weight)
    assert loss.dtype == FP32
    assert cuda_loss.aligned_head(weight, dtype).shape == (cuda_loss.aligned(vocab), 16)


@pytest.mark.parametrize(("n", "vocab", "dtype"), [(33, 101, FP32), (33, 64, BF16), (9, 101, FP16)])
def test_scores_are_those_of_cross_entropy_and_argmax(n, vocab, dtype):
    hidden, weight, targets = case(n, vocab, dtype)
    targets[::2] = (hidden @ weight.T).argmax(-1)[::2]
    losses, hits = cuda_loss.token_losses(hidden, weight, targets)
    logits = hidden.detach().double() @ weight.detach().double().T
    assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), TOLERANCE[dtype])
    assert losses.dtype == FP32 and losses.shape == hits.shape == (n,)
    assert torch.equal(hits, (hidden @ weight.T).argmax(-1) == targets) and n / 2 <= hits.sum() < n


def test_a_likely_token_keeps_its_small_gradient():
    """In bf16, p = 0.9999 rounds to 1, and p - 1 to 0."""
    hidden = torch.tensor([[9.25]], device=DEVICE, dtype=BF16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], device=DEVICE, dtype=BF16)
    targets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    fast(targets)(hidden, weight).backward()
    p = torch.tensor(9.25).sigmoid().item()
    assert hidden.grad.item() == pytest.approx(p - 1, rel=0.01) and p > 0.9999


def test_loss_is_right_where_a_probability_underflows_and_shows_what_is_not_a_number():
    hidden = torch.tensor([[200.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    targets = torch.ones(1, dtype=torch.int64, device=DEVICE)
    loss = fast(targets)(hidden, weight)
    assert loss.item() == pytest.approx(400)
    assert torch.autograd.grad(loss, hidden)[0].item() == pytest.approx(2)
    assert fast(targets)(hidden * torch.nan, weight).isnan()


def test_a_padded_head_is_a_copy_with_rows_of_zeros():
    _, weight, _ = case(33, 101, FP32)
    padded = cuda_loss.aligned_head(weight, BF16)
    assert torch.equal(padded[:101], weight.bfloat16()) and not padded[101:].any()
    assert not padded.requires_grad
