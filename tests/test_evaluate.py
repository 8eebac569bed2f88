"""Scores against a token-by-token loop over a stock transformers model, and against its loss."""

import copy
import math

import numpy as np
import pytest
import torch

from data.tokens import encode
from errors import RunError
from evaluate import Scores, evaluate
from model.checkpoint import load_gpt2
from model.tokenizer import load_tokenizer
from tests.helpers import TINY, tiny_gpt2_directory

TEXT = "Ein naïver “Text”: 日本語, 😀. No length here is a multiple of anything, as in life.\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Our model and transformers', of the same weights, in evaluation mode."""
    directory, theirs = tiny_gpt2_directory(tmp_path_factory.mktemp("tiny"))
    return load_gpt2(directory), theirs


@pytest.fixture(scope="module")
def tokens(models):
    """A text that the model itself continues, so that it guesses some tokens right."""
    ids = encode(load_tokenizer(TINY["vocab_size"]), TEXT).astype(int)
    prompt = torch.from_numpy(ids[-20:])[None]
    own = models[1].generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    return np.concatenate((ids, own[0, 20:].numpy(), ids[:11])).astype(np.uint16)


@torch.no_grad()
def reference(model, tokens, block: int, stride: int, shift: int) -> tuple[float, int]:
    """The summed loss in nats and the number of right guesses, one token after the other."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    loss, right, position = 0.0, 0, shift
    for start in range(0, len(ids), stride):
        logits = model(ids[None, start : start + block]).logits[0].double()
        while position < min(start + block + shift, len(ids)):
            row = logits[position - shift - start]
            loss -= row.log_softmax(0)[ids[position]].item()
            right += int(row.argmax() == ids[position])
            position += 1
    return loss, right


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("block, stride", [(16, None), (16, 16), (16, 13), (16, 7), (16, 1), (1, 1),
                                           (64, 50), (64, None)])
def test_scores_are_those_of_a_plain_loop(models, tokens, block, stride, shift, batch_size):
    ours, theirs = models
    scores = evaluate(ours, tokens, block_size=block, stride=stride, label_shift=shift,
                      batch_size=batch_size)
    loss, right = reference(theirs, tokens, block, stride or block, shift)
    assert scores.tokens == len(tokens) - shift
    assert scores.loss == pytest.approx(loss / scores.tokens, rel=1e-6)
    assert scores.accuracy == right / scores.tokens
    if shift == 1 and block > 1:
        assert 0 < right < scores.tokens


def test_a_block_longer_than_the_text_is_one_window(models, tokens):
    ours, theirs = models
    scores = evaluate(ours, tokens[:37], block_size=64)
    loss, _ = reference(theirs, tokens[:37], 37, 37, 1)
    assert scores.loss == pytest.approx(loss / 36, rel=1e-6)


def test_in_one_window_the_loss_is_transformers_own(models, tokens):
    ours, theirs = models
    ids = torch.from_numpy(tokens[:61].astype(np.int64))[None]
    with torch.no_grad():
        once = theirs(input_ids=ids, labels=ids).loss.item()
        # What the reference run measured: labels shifted by hand, and again by the library.
        twice = theirs(input_ids=ids[:, :-1], labels=ids[:, 1:]).loss.item()
    losses = [evaluate(ours, tokens[:61], block_size=64, label_shift=shift).loss
              for shift in (1, 2)]
    assert losses == pytest.approx([once, twice], rel=1e-6)
    assert abs(once - twice) > 0.01


@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
def test_bits_per_byte_count_the_bytes_of_the_scored_tokens(models, skipped):
    ours, theirs = models
    text = "日本" + TEXT  # three tokens of a byte each for the first character
    tokens = encode(load_tokenizer(TINY["vocab_size"]), text)[skipped:]
    for shift in (1, 2):
        scores = evaluate(ours, tokens, block_size=32, label_shift=shift)
        loss, _ = reference(theirs, tokens, 32, 32, shift)
        assert scores.bytes == len(text.encode()) - skipped - shift
        assert scores.bits_per_byte == pytest.approx(loss / math.log(2) / scores.bytes, rel=1e-6)


def test_perplexity_is_the_exponential_of_the_loss():
    assert Scores(tokens=4, bytes=9, loss=math.log(7), accuracy=0).perplexity == pytest.approx(7)
    assert math.isfinite(Scores(tokens=4, bytes=9, loss=1e4, accuracy=0).perplexity)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(models, tokens, training):
    ours, _ = models
    expected = evaluate(ours.eval(), tokens, block_size=16)
    assert ours.drop.p > 0
    scores = evaluate(ours.train(training), tokens, block_size=16)
    modes = {module.training for module in ours.modules()}
    ours.eval()
    assert scores == expected and modes == {training}


def test_evaluation_keeps_no_graph(models, tokens):
    ours, _ = models
    graphs = []
    hook = ours.ln_f.register_forward_hook(lambda *seen: graphs.append(seen[-1].requires_grad))
    evaluate(ours, tokens, block_size=16)
    hook.remove()
    assert graphs and not any(graphs) and torch.is_grad_enabled()


def test_bf16_is_close(models, tokens):
    ours, _ = models
    exact, rounded = (evaluate(ours, tokens, block_size=16, precision=precision).loss
                      for precision in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=0.01) and rounded != exact


def test_a_loss_that_is_no_number_is_an_error(models, tokens):
    broken = copy.deepcopy(models[0])
    broken.ln_f.bias.data[0] = math.nan
    with pytest.raises(RunError, match="the loss on the text is nan"):
        evaluate(broken, tokens, block_size=16)


def test_a_stride_above_the_block_is_refused(models, tokens):
    with pytest.raises(ValueError, match="stride 17 is not from 1 to the block size, 16"):
        evaluate(models[0], tokens, block_size=16, stride=17)
