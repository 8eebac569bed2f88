"""`evaluate.py --forgotten` against two stock models, the base and the base with PEFT's adapter."""

import json

import pytest
import torch
import torch.nn.functional as F

from lora.save import save_adapter
from tests.helpers import TINY, small_tokenizer
from tests.pairs import ALL_FOUR, KINDS, adapted
from tests.runs import questions, scores, stock_model, story

BLOCK = 16
BLOCK_OF_EXAMPLES = 60
TOKENIZER = small_tokenizer(TINY["vocab_size"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(story(6))
    return path


def forgotten(tmp_path, base, adapter, *options) -> tuple[float, float]:
    """Return the KL and the share that the command reports."""
    block = BLOCK_OF_EXAMPLES if "--data" in options else BLOCK
    argv = ("--base", base, "--adapter", adapter, "--block-size", block, "--forgotten")
    found, said = scores(tmp_path / "scores.json", *argv, *options)
    kl, share = found["kl_from_base"], found["changed_choices"]
    assert f"KL(base || adapter) {kl:.4f} nats per token, the likeliest token changed at" in said
    assert f"{share:.2%} of the tokens" in said
    return kl, share


def windows(text) -> list[tuple[list[int], int]]:
    """Return the inputs of each window, and how many of its tokens are not scored: none."""
    ids = encode(text.read_text())[:-1]
    assert len(ids) % BLOCK != 0  # the last window is shorter
    return [(ids[start : start + BLOCK], 0) for start in range(0, len(ids), BLOCK)]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text).astype(int).tolist()


@torch.no_grad()
def reference(base, adapter, inputs) -> tuple[float, float]:
    """Return the KL and the share of two stock models, in fp64, one window after the other."""
    before, after = stock_model(base).double(), stock_model(base, adapter).double()
    kl, changed, count = 0.0, 0, 0
    for ids, skipped in inputs:
        p, q = (model(torch.tensor([ids])).logits[0, skipped:] for model in (before, after))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        changed += int((p.argmax(-1) != q.argmax(-1)).sum())
        count += len(p)
    return kl / count, changed / count


@pytest.mark.parametrize("kind", ("lora", "dora"))
def test_the_kl_and_the_share_are_those_of_two_stock_models(base, text, tmp_path, kind):
    _, fields = KINDS[kind]
    save_adapter(adapted(base, ALL_FOUR, r=2, **fields), tmp_path / "adapter", "gpt2")
    kl, share = forgotten(tmp_path, base, tmp_path / "adapter", "--text", text)
    expected = reference(base, tmp_path / "adapter", windows(text))
    assert kl == pytest.approx(expected[0], abs=1e-6) and kl > 0.01
    assert share == expected[1] and 0 < share < 1


def test_of_conversations_only_the_answers_count(base, adapter, tmp_path):
    inputs = []
    for line in questions(tmp_path / "data.jsonl").read_text().splitlines():
        example = json.loads(line)
        before = encode(f"User: {example['prompt'].strip()}\nAssistant:")
        ids = before + encode(f" {example['completion'].strip()}")
        lost = max(0, len(ids) - BLOCK_OF_EXAMPLES)  # an example loses its beginning
        inputs.append((ids[lost:], len(before) - 1 - lost))
    found = forgotten(tmp_path, base, adapter, "--data", tmp_path / "data.jsonl")
    kl, share = reference(base, adapter, inputs)
    assert found == (pytest.approx(kl, abs=1e-6), share)
