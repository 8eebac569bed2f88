"""The experiment on SmolLM2, with a tiny random Llama."""

import math

import pytest
import torch
import transformers

from lesson.examples import any_model
from lesson.experiments import smollm2, sweep
from tests.helpers import write_small_tokenizer
from tests.models import small_llama
from training.options import BOOK

LORA = {"method": "lora", "r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A tiny random Llama in place of SmolLM2, and the beginning of the book as the text."""
    model = small_llama().eval()
    write_small_tokenizer(tmp_path, 317)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "book.txt").write_text(BOOK.read_text()[:20_000])
    monkeypatch.setattr(any_model, "BOOK", tmp_path / "book.txt")
    monkeypatch.setattr(smollm2, "base", lambda: (model, tokenizer))
    monkeypatch.setattr(sweep, "CELLS", tmp_path / "known" / "cells.jsonl")
    for cached in (smollm2.load_task, smollm2.base_texts, smollm2.base_on_task):
        cached.cache_clear()
    yield model
    for cached in (smollm2.load_task, smollm2.base_texts, smollm2.base_on_task):
        cached.cache_clear()


@pytest.mark.parametrize("method", [LORA, {"method": "full"}], ids=["LoRA", "full"])
def test_a_change_scaled_to_zero_is_the_base(llama, method):
    start = smollm2.scores(llama, "book", short=True)
    assert start["kl"] == start["task_kl"] == 0
    inputs, targets = next(smollm2.load_task("book")[1].evaluation_batches(10**6))
    stock = transformers.LlamaForCausalLM(llama.config).eval()
    stock.load_state_dict(llama.state_dict())
    with torch.no_grad():
        logits = stock(input_ids=inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert start["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)

    trained, half, none = smollm2.finetune(
        1e-2, 0, short=True, task="book", scales=(0.5, 0.0), **method
    )
    assert none["perplexity"] == pytest.approx(start["perplexity"], rel=1e-5)
    assert none["kl"] == pytest.approx(0, abs=1e-5)
    assert trained["perplexity"] < 0.99 * start["perplexity"]
    for kl in ("kl", "task_kl"):
        assert trained[kl] > half[kl] > 1e-6


def test_a_stored_result_is_returned_and_another_seed_is_another_run(llama, monkeypatch):
    options = {"task": "book", **LORA}
    [found] = smollm2.run(options, True, 1e-2, [0])
    monkeypatch.setattr(smollm2, "finetune", lambda *_, **__: "trained again")
    assert smollm2.run(options, True, 1e-2, [0, 1]) == [found, "trained again"]
