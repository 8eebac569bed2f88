"""The example on real weights, on a tiny random Llama: `python -m lesson.examples.any_model`."""

import json
import runpy
import sys
from unittest import mock

import peft
import pytest
import torch
import transformers

from lesson.examples.any_model import main
from lora.peft_config import CONFIG
from tests.helpers import relative_difference, write_small_tokenizer
from tests.runs import stdout_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of random weights as transformers saves one, with a tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=317,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=316,
        eos_token_id=316,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    write_small_tokenizer(directory, 317)
    return directory


def test_it_trains_as_peft_does_and_peft_loads_what_it_saves(llama, tmp_path):
    options = ("--model", llama, "--steps", 12, "--lr", 2e-2, "--precision", "fp32")
    ours = stdout_of(main, *options, "--out", tmp_path / "ours").splitlines()
    theirs = stdout_of(main, *options, "--out", tmp_path / "theirs", "--peft").splitlines()
    shared = len(theirs)  # before and while training
    assert ours[:shared] == theirs and sum(": loss " in line for line in theirs) == 12
    scores = [float(line.split()[-1]) for line in ours if line.startswith("validation perplexity")]
    assert len(scores) == 3 and scores[-1] < 0.95 * scores[0]

    samples = ours[1:4]
    in_peft, *after = ours[shared:]
    assert len(after) == 3 and after != samples
    assert float(in_peft.split()[-1]) == pytest.approx(min(scores), rel=1e-5)
    stored = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (stored["task_type"], stored["fan_in_fan_out"]) == ("CAUSAL_LM", False)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.arange(64)[None]
    expected = base(input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    assert relative_difference(loaded(input_ids=ids).logits, expected) > 0.01


def test_peft_and_bitsandbytes_are_imported_only_where_they_are_used():
    """bitsandbytes can print a warning when it is imported."""
    with mock.patch.dict(sys.modules, {"peft": None, "bitsandbytes": None}):
        assert runpy.run_module("lesson.examples.any_model")["main"]
