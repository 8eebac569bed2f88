"""Compare scores with a token-by-token loop over a stock transformers model."""

import copy
import math

import numpy as np
import pytest
import torch

from common.device import Device
from common.errors import RunError, UserError
from data.tokens import Tokens
from data.windows import Windows
from evaluation.scores import Scores, evaluate
from storage.weights import load_gpt2
from tests.helpers import TINY, small_tokenizer
from tests.runs import stock_model

TEXT = "Ein naïver “Text”: 日本語, 😀. No length here is a multiple of anything, as in life.\n"
TOKENIZER = small_tokenizer(TINY["vocab_size"])


@pytest.fixture(scope="module")
def models(base):
    """Return our model and transformers' model with the same weights, and a text as tokens.

    The model continues the text, so that it guesses some tokens right.
    """
    theirs = stock_model(base)
    ids = TOKENIZER.encode(TEXT).astype(int)
    prompt = torch.from_numpy(ids[-20:])[None]
    own = theirs.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    tokens = np.concatenate((ids, own[0, 20:].numpy(), ids[:11])).astype(np.uint16)
    return load_gpt2(base), theirs, tokens


def score(
    model,
    tokens,
    block: int,
    stride: int | None = None,
    shift: int = 1,
    batch_size: int = 16,
    precision: str = "fp32",
) -> Scores:
    if isinstance(tokens, np.ndarray):
        tokens = Tokens(tokens, np.ones(len(tokens), dtype=np.uint32))
    windows = Windows(tokens.ids, block, stride or block, shift, tokens.byte_counts)
    return evaluate(model, windows, Device.pick("cpu", precision), batch_size=batch_size)


@torch.no_grad()
def reference(model, tokens, block: int, stride: int, shift: int) -> tuple[float, int]:
    """Return the summed loss in nats and the number of right guesses, token by token."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    loss = 0.0
    right = 0
    position = shift
    for start in range(0, len(ids), stride):
        logits = model(ids[None, start : start + block]).logits[0].double()
        while position < min(start + block + shift, len(ids)):
            row = logits[position - shift - start]
            loss -= row.log_softmax(0)[ids[position]].item()
            right += int(row.argmax() == ids[position])
            position += 1
    return loss, right


@pytest.mark.parametrize(
    "block, stride, shift, batch_size",
    [(16, 7, 2, 1), (16, 1, 1, 3)],
)
def test_scores_are_those_of_a_plain_loop(models, block, stride, shift, batch_size):
    ours, theirs, tokens = models
    scores = score(ours, tokens, block, stride, shift, batch_size)
    loss, right = reference(theirs, tokens, block, stride, shift)
    assert scores.tokens == len(tokens) - shift
    assert scores.loss == pytest.approx(loss / scores.tokens, rel=1e-6)
    assert scores.accuracy == right / scores.tokens
    if shift == 1:
        assert 0 < right < scores.tokens


def test_bits_per_byte_count_the_bytes_of_the_scored_tokens(models):
    ours, theirs, _ = models
    text = f"abcd{TEXT}<|endoftext|>{TEXT}"  # each of the first tokens is one byte
    tokens = Tokens(*TOKENIZER.encode_with_bytes(text))
    for skipped, shift in ((0, 1), (1, 2), (2, 1)):
        scores = score(ours, tokens[skipped:], 32, shift=shift)
        loss, _ = reference(theirs, tokens.ids[skipped:], 32, 32, shift)
        assert scores.bytes == len(f"abcd{TEXT}{TEXT}".encode()) - skipped - shift
        assert scores.bits_per_byte == pytest.approx(loss / math.log(2) / scores.bytes, rel=1e-6)


def test_perplexity_is_the_exponential_of_the_loss_and_always_finite():
    assert Scores(4, 9, loss=math.log(7), accuracy=0).perplexity == pytest.approx(7)
    assert math.isfinite(Scores(4, 9, loss=1e4, accuracy=0).perplexity)


def test_dropout_is_off_no_graph_is_kept_and_the_mode_comes_back(models):
    ours, _, tokens = models
    for training in (True, False):
        model = copy.deepcopy(ours)
        graphs = []
        assert model.drop.p > 0
        model.ln_f.register_forward_hook(lambda *seen, to=graphs: to.append(seen[-1].requires_grad))
        assert score(model.train(training), tokens, 16) == score(ours, tokens, 16)
        assert {module.training for module in model.modules()} == {training}
        assert graphs and not any(graphs) and torch.is_grad_enabled()


def test_a_loss_that_is_not_a_number_is_an_error(models):
    broken = copy.deepcopy(models[0])
    broken.ln_f.bias.data[0] = math.nan
    with pytest.raises(RunError, match="the loss on the text is nan"):
        score(broken, models[2], 16)
    with pytest.raises(UserError, match="only end-of-text tokens"):
        score(models[0], Tokens(np.array([0, TOKENIZER.end_of_text]), np.array([1, 0])), 16)
