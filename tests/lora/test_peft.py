"""Exchange adapters and merged models with stock PEFT and transformers, both ways."""

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
from tests.helpers import relative_difference, tiny_gpt2
from tests.pairs import IDS, randomize

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # including PEFT's warnings
FP32, BF16 = torch.float32, torch.bfloat16
MATRIX = [
    (BF16, {"r": 8, "lora_alpha": 12, "use_rslora": True}, ["c_fc", "attn.c_proj"]),
    (FP32, {"r": 2}, "all-linear"),  # PEFT then writes full names of transformers' model
    (
        FP32,
        {"rank_pattern": {r"h\.1\..*": 3}, "alpha_pattern": {"transformer.h.0.mlp.c_proj": 2.5}},
        r"transformer\.h\.[01]\..*c_(attn|proj)",
    ),
    (FP32, {"layers_to_transform": [1], "rank_pattern": {"c_fc": 5}}, ["attn.c_proj", "c_fc"]),
]


@pytest.fixture
def base(dtype, tmp_path):
    """Return a base that transformers stored in `dtype`."""
    tiny_gpt2().to(dtype).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def stock(directory, dtype=FP32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def peft_adapter(base, directory, config, targets):
    """Make and save a random adapter with PEFT. Return the model."""
    settings = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, "target_modules": targets}
    model = peft.get_peft_model(stock(base), peft.LoraConfig(**settings, **config))
    randomize(model)
    model.save_pretrained(directory)
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, base):
    expected = theirs(IDS).logits
    assert relative_difference(ours(IDS), expected) < 1e-6
    assert relative_difference(expected, stock(base)(IDS).logits) > 0.01  # the adapter counts


@pytest.mark.parametrize("dtype, config, targets", MATRIX)
def test_each_loads_the_others_adapter_and_merges_to_the_same_weights(
    base, tmp_path, config, targets
):
    theirs = peft_adapter(base, tmp_path, config, targets)
    ours = load_gpt2(base)
    loaded = load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs, base)
    assert config.items() <= json.loads(json.dumps(vars(loaded))).items()  # tuples become lists
    save_adapter(ours, tmp_path / "again", str(base))
    first = load_file(tmp_path / WEIGHTS)
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    stored = peft.LoraConfig.from_pretrained(tmp_path / "again")
    assert config.items() <= vars(stored).items()
    assert_same_logits(ours, peft.PeftModel.from_pretrained(stock(base), tmp_path / "again"), base)
    theirs = theirs.merge_and_unload()
    merge(ours)
    unwrap(ours)
    save_gpt2(ours, tmp_path / "merged")
    loaded = stock(tmp_path / "merged")
    assert_same_logits(lambda ids: loaded(ids).logits, theirs, base)
    merged = loaded.state_dict()
    expected = theirs.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
