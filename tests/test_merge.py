"""Merging, unmerging and disabling an adapter, and `python -m lora.merge`."""

import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lora.adapter import CONFIG, WEIGHTS, save_adapter
from lora.config import LoRAConfig
from lora.inject import adapter_disabled, lora_layers, merge, unmerge, unwrap
from lora.layer import LoRALinear
from model.checkpoint import load_gpt2
from tests.adapters import adapted, randomize
from tests.helpers import TINY, relative_difference, token_ids

ROOT = Path(__file__).resolve().parents[1]
IDS = token_ids(TINY["vocab_size"], 2, 16)


def base_weights(model):
    return {name: m.base_layer.weight.clone() for name, m in lora_layers(model).items()}


@pytest.mark.parametrize("target", ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"])
def test_merging_changes_no_logit_and_unmerging_restores_the_base(base, target):
    model, _ = adapted(base, (target,), lora_alpha=5)
    expected, original = model(IDS), base_weights(model)
    merge(model)
    merged = base_weights(model)
    assert all((merged[name] - original[name]).abs().max() > 0.1 for name in original)
    assert relative_difference(model(IDS), expected) < 1e-5
    merge(model)  # a second merge is none
    assert all(torch.equal(w, merged[name]) for name, w in base_weights(model).items())
    unmerge(model)
    unmerge(model)
    for name, weight in base_weights(model).items():
        rounding = 2**-24 * (merged[name].abs() + original[name].abs())
        assert ((weight - original[name]).abs() <= rounding).all()
    assert relative_difference(model(IDS), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
def test_a_merged_weight_is_the_fp64_sum_rounded_once_and_pefts(dtype, shape):
    torch.manual_seed(4)
    layer = LoRALinear(nn.Linear(*shape, dtype=dtype), LoRAConfig(r=8, lora_alpha=16))
    randomize(layer)
    original = layer.base_layer.weight.detach().clone()
    truth = original.double() + 2 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    layer.merge()
    merged = layer.base_layer.weight.detach().clone()
    if dtype == torch.float32:  # the sum is rounded, and so are the products in it
        assert relative_difference(merged, truth) < 1e-6
    else:  # but where fp32 falls on another side of the middle of two numbers
        assert (merged == truth.to(dtype)).float().mean() > 0.99
    assert torch.equal(merged, merged_by_peft(original, layer))


def merged_by_peft(weight, layer):
    out, fan_in = weight.shape
    model = nn.Sequential(nn.Linear(fan_in, out, dtype=weight.dtype))
    model[0].load_state_dict({"weight": weight, "bias": layer.base_layer.bias})
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    theirs = model.base_model.model[0]
    theirs.lora_A.default.load_state_dict(layer.lora_A.state_dict())
    theirs.lora_B.default.load_state_dict(layer.lora_B.state_dict())
    return model.merge_and_unload()[0].weight


def test_unwrapping_a_merged_model_leaves_plain_layers_with_its_logits(base):
    model, _ = adapted(base)
    expected = model(IDS)
    merge(model)
    unwrap(model)
    assert model.state_dict().keys() == load_gpt2(base).state_dict().keys()
    assert relative_difference(model(IDS), expected) < 1e-5


def test_a_disabled_adapter_leaves_the_base_even_when_the_block_fails(base):
    model, _ = adapted(base)
    with_adapter, without = model(IDS), load_gpt2(base)(IDS)
    assert relative_difference(with_adapter, without) > 0.1
    with pytest.raises(KeyError), adapter_disabled(model):
        assert torch.equal(model(IDS), without)
        with adapter_disabled(model):
            pass
        assert torch.equal(model(IDS), without)  # the inner block leaves the outer one be
        raise KeyError
    assert torch.equal(model(IDS), with_adapter)


def test_a_merged_adapter_cannot_be_disabled(base):
    model, _ = adapted(base)
    merge(model)
    with pytest.raises(ValueError, match="unmerge it first"), adapter_disabled(model):
        pass


# python -m lora.merge


def refusal(monkeypatch, capsys, *options):
    """The one line with which the command ends, its status 2."""
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lora.merge", run_name="__main__")
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_the_command_writes_one_model_and_never_replaces_it(base, tmp_path, monkeypatch, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    model, config = adapted(base)
    save_adapter(model, config, adapter, "gpt2")
    options = "--base", base, "--adapter", adapter, "--out", out
    done = subprocess.run([sys.executable, "-m", "lora.merge", *map(str, options)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{base} + {adapter} -> {out}\n"
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files.keys() == {"config.json", "model.safetensors"}
    assert relative_difference(load_gpt2(out)(IDS), model(IDS)) < 1e-5
    assert f"{out}: exists already" in refusal(monkeypatch, capsys, *options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


@pytest.mark.parametrize(("options", "reason"), [
    ("--base BASE --out OUT", "--adapter is missing"),
    ("--base BASE --adapter ADAPTER", "--out"),
    ("--base BASE --adapter BASE --out OUT", CONFIG),
    ("--base BASE --adapter nowhere --out OUT", f"nowhere/{CONFIG}"),
    ("--base nowhere --adapter ADAPTER --out OUT", "nowhere"),
    ("--base BASE --adapter ADAPTER --out ADAPTER", "exists already"),
    (f"--base BASE --adapter ADAPTER --out ADAPTER/{WEIGHTS}", "exists already"),
    (f"--base BASE --adapter ADAPTER --out ADAPTER/{WEIGHTS}/out", "cannot be written"),
])
def test_the_command_refuses_in_one_line_and_leaves_nothing(
    base, tmp_path, monkeypatch, capsys, options, reason
):
    model, config = adapted(base)
    save_adapter(model, config, tmp_path / "adapter", "gpt2")
    before = sorted(tmp_path.rglob("*"))
    for name, place in (("BASE", base), ("ADAPTER", tmp_path / "adapter"),
                        ("OUT", tmp_path / "out")):
        options = options.replace(name, str(place))
    assert reason in refusal(monkeypatch, capsys, *options.split())
    assert sorted(tmp_path.rglob("*")) == before
