"""Exchange an adapter and a merged model with stock PEFT and transformers, both ways."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora.load import load_adapter
from lora.merge import merge, unwrap
from lora.save import WEIGHTS, save_adapter
from storage.weights import load_gpt2, save_gpt2
from tests.helpers import relative_difference
from tests.pairs import IDS, randomize

CONFIG = {
    "lora_alpha": 12,
    "use_rslora": True,
    "rank_pattern": {r"h\.1\..*": 3},
    "alpha_pattern": {"transformer.h.0.mlp.c_proj": 2.5},
}
TARGETS = r"transformer\.h\.[01]\..*c_(attn|proj)"


def stock(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def assert_same_logits(ours, theirs, base):
    expected = theirs(IDS).logits
    assert relative_difference(ours(IDS), expected) < 1e-5
    assert relative_difference(expected, stock(base)(IDS).logits) > 0.01  # the adapter counts


@pytest.mark.filterwarnings("error::UserWarning")  # including PEFT's warnings
def test_each_loads_the_others_adapter_and_merges_to_the_same_weights(base, tmp_path):
    settings = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, "target_modules": TARGETS}
    theirs = peft.get_peft_model(stock(base), peft.LoraConfig(**settings, **CONFIG))
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = load_gpt2(base)
    loaded = load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs, base)
    assert CONFIG.items() <= json.loads(json.dumps(vars(loaded))).items()  # tuples become lists

    save_adapter(ours, tmp_path / "again", str(base))
    first = load_file(tmp_path / WEIGHTS)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert_same_logits(ours, peft.PeftModel.from_pretrained(stock(base), tmp_path / "again"), base)

    theirs = theirs.merge_and_unload()
    merge(ours)
    unwrap(ours)
    save_gpt2(ours, tmp_path / "merged")
    merged = stock(tmp_path / "merged").state_dict()
    expected = theirs.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
