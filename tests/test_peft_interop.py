"""Adapters and merged models exchanged with stock PEFT and transformers, both ways."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.plain import plain_operations
from lora.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from lora.inject import lora_layers, merge, unwrap
from model.checkpoint import load_gpt2, save_gpt2
from tests.adapters import adapted, randomize
from tests.helpers import TINY, relative_difference, tiny_gpt2, token_ids

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # PEFT's, too
IDS = token_ids(TINY["vocab_size"], 2, 24)
MATRIX = {
    "r 1": ({"r": 1, "lora_alpha": 16}, ["c_attn"]),
    "r 2": ({"r": 2, "lora_alpha": 3}, ["c_proj"]),
    "r 8": ({"r": 8, "lora_alpha": 16}, ["c_attn", "c_proj", "c_fc"]),
    "r 64": ({"r": 64, "lora_alpha": 5}, ["c_attn", "mlp.c_proj"]),
    "rslora": ({"r": 8, "lora_alpha": 12, "use_rslora": True}, ["c_fc", "attn.c_proj"]),
    "one layer": ({"r": 4, "lora_alpha": 1}, ["h.1.attn.c_attn"]),
}
matrix = pytest.mark.parametrize(("config", "targets"), MATRIX.values(), ids=MATRIX)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def base(request, tmp_path_factory):
    """A base 64 wide, so that rank 64 fits, stored by transformers in each precision."""
    directory = tmp_path_factory.mktemp("base")
    tiny_gpt2(n_embd=64).to(request.param).save_pretrained(directory)
    return directory


def stock(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def peft_adapter(base, directory, config, targets):
    """A random adapter made and saved by PEFT; returns the model."""
    model = peft.get_peft_model(stock(base), peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=True, **config))
    randomize(model)
    model.save_pretrained(directory)
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, base):
    expected = theirs(IDS).logits
    assert relative_difference(ours(IDS), expected) < 1e-6
    assert relative_difference(expected, stock(base)(IDS).logits) > 0.01  # the adapter counts


@matrix
def test_peft_loads_our_adapter_without_a_warning(base, tmp_path, config, targets):
    ours, lora_config = adapted(base, tuple(targets), **config)
    save_adapter(ours, lora_config, tmp_path, str(base))
    theirs = peft.PeftModel.from_pretrained(stock(base), tmp_path)
    assert_same_logits(ours, theirs, base)
    stored = peft.LoraConfig.from_pretrained(tmp_path)
    assert stored.target_modules == set(targets) and stored.base_model_name_or_path == str(base)
    assert config.items() <= stored.to_dict().items()


@matrix
def test_we_load_pefts_adapter(base, tmp_path, config, targets):
    theirs = peft_adapter(base, tmp_path, config, targets)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written.keys() == peft.LoraConfig().to_dict().keys()  # in full
    ours = load_gpt2(base)
    loaded = load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs, base)
    assert (loaded.r, loaded.lora_alpha) == (config["r"], config["lora_alpha"])
    save_adapter(ours, loaded, tmp_path / "again", "gpt2")
    first, again = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


@matrix
def test_merged_models_are_the_same(base, tmp_path, config, targets):
    theirs = peft_adapter(base, tmp_path, config, targets).merge_and_unload()
    ours = load_gpt2(base)
    load_adapter(ours, tmp_path)
    merge(ours)
    unwrap(ours)
    save_gpt2(ours, tmp_path / "merged")
    loaded = stock(tmp_path / "merged")
    assert_same_logits(lambda ids: loaded(ids).logits, theirs, base)
    ours, theirs = loaded.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@plain_operations()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_base_held_in_half_precision_logits_are_pefts(base, tmp_path, dtype):
    peft_adapter(base, tmp_path, {"r": 8, "lora_alpha": 16}, ["c_attn", "c_proj", "c_fc"])
    theirs = peft.PeftModel.from_pretrained(stock(base, dtype), tmp_path)(IDS).logits
    ours = load_gpt2(base).to(dtype)
    load_adapter(ours, tmp_path)
    assert all(layer.lora_A.weight.dtype == torch.float32 for layer in lora_layers(ours).values())
    ours = ours(IDS)
    assert ours.dtype == theirs.dtype == dtype
    assert relative_difference(ours, theirs) < 2 * torch.finfo(dtype).eps
    assert relative_difference(theirs, stock(base, dtype)(IDS).logits) > 0.1


def test_what_peft_makes_of_all_linear_is_loaded(base, tmp_path):
    theirs = peft_adapter(base, tmp_path, {"r": 2}, "all-linear")
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert "transformer.h.0.attn.c_attn" in targets  # full names, in transformers' model
    ours = load_gpt2(base)
    load_adapter(ours, tmp_path)
    assert len(lora_layers(ours)) == 8
    assert_same_logits(ours, theirs, base)


def train(model, logits_of, seed):
    """The losses of three AdamW steps on A and B with all dropouts on, alike for one seed."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(3):
        torch.manual_seed(seed + step)
        logits = logits_of(model(IDS[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def ours_train(base, adapter, out, seed):
    model = load_gpt2(base)
    config = load_adapter(model, adapter)
    losses = train(model, lambda logits: logits, seed)
    save_adapter(model, config, out, str(base))
    return losses


def theirs_train(base, adapter, out, seed):
    model = peft.PeftModel.from_pretrained(stock(base), adapter, is_trainable=True)
    losses = train(model, lambda output: output.logits, seed)
    model.save_pretrained(out)
    return losses


@plain_operations()
def test_each_continues_the_others_training(base, tmp_path):
    start, half, end = (tmp_path / name for name in ("start", "half", "end"))
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
    peft_adapter(base, start, config, ["c_attn", "c_proj", "c_fc"])
    expected = theirs_train(base, start, half, seed=0), theirs_train(base, half, end, seed=10)
    assert expected[1][0] < expected[0][0] - 0.1
    for first in (ours_train, theirs_train):
        assert first(base, start, half, seed=0) == pytest.approx(expected[0], rel=1e-6)
        for second in (ours_train, theirs_train):
            assert second(base, half, end, seed=10) == pytest.approx(expected[1], rel=1e-6)
