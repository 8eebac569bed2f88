"""`python -m lora_conformance merged` on merges by stock PEFT, right and wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from generators.fixtures import load
from lora_conformance import fixtures
from lora_conformance.merged import main

FIXTURES = fixtures.index()["fixtures"]
TIED_HEAD = "qwen3-tied-head"
MLP = "llama-mlp-rslora"
BASE = fixtures.HERE / "bases" / "llama"
ADAPTER = fixtures.HERE / "adapters" / MLP


def base_of(name: str) -> Path:
    return fixtures.HERE / FIXTURES[name]["base"]


def adapter_of(name: str) -> Path:
    return fixtures.HERE / FIXTURES[name]["adapter"]


def merge(base: Path, adapter: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Merge with stock PEFT in `dtype`, in several shards, and return the folder."""
    model = load(base, adapter).to(dtype).merge_and_unload()
    model.save_pretrained(out, max_shard_size="150KB")
    return out


def edited(name: str, out: Path, factor: float = 1.0, **config: object) -> Path:
    """Copy a fixture's adapter, with a multiple of B and other values in its config."""
    shutil.copytree(adapter_of(name), out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    path = out / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, tensor in tensors.items():
        tensor *= factor if "lora_B" in key else 1.0
    save_file(tensors, path)
    return out


def verdict(capsys, *folders: Path) -> tuple[int, list[str]]:
    """Return the exit status, and the lines after the layers' lines."""
    status = main([str(folder) for folder in folders])
    lines = capsys.readouterr().out.splitlines()
    return status, [line for line in lines if not line.startswith(" ")]


@pytest.mark.parametrize("name", sorted(FIXTURES.keys() - {TIED_HEAD}))
def test_an_update_merged_by_peft_survives(name, tmp_path, capsys):
    merged = merge(base_of(name), adapter_of(name), tmp_path)
    assert len(list(merged.glob("*.safetensors"))) > 1
    status, lines = verdict(capsys, base_of(name), adapter_of(name), merged)
    assert (status, {line.split(":")[0] for line in lines} - {"unchanged"}) == (0, {"survived"})


@pytest.mark.parametrize("name", sorted(FIXTURES.keys() - {TIED_HEAD}))
def test_the_base_in_place_of_the_merged_model_is_lost(name, capsys):
    status, lines = verdict(capsys, base_of(name), adapter_of(name), base_of(name))
    assert status == 1 and len(lines) == 1 and lines[0].startswith("lost: ")


@pytest.mark.parametrize("name", ["gpt2-attention", MLP, "qwen3-dora", "qwen3-moe-experts"])
def test_an_update_that_is_merged_twice_is_named(name, tmp_path, capsys):
    once = merge(base_of(name), adapter_of(name), tmp_path / "once")
    twice = merge(once, adapter_of(name), tmp_path / "twice")
    status, lines = verdict(capsys, base_of(name), adapter_of(name), twice)
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith("applied twice, or scaled by 2: ")


def test_a_layer_that_is_left_out_is_named(tmp_path, capsys):
    merge(BASE, ADAPTER, tmp_path)
    left_out = "model.layers.1.mlp.up_proj.weight"
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        if left_out in tensors:
            tensors[left_out] = load_file(BASE / "model.safetensors")[left_out]
            save_file(tensors, path)
    assert main([str(BASE), str(ADAPTER), str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if " lost " in line] == [["1.0000", "lost", left_out]]
    assert set(lines[6:]) == {"survived: 5 of 6 parameters", "lost: 1 of 6 parameters"}


def test_rslora_that_is_merged_with_alpha_over_r_is_scaled_wrongly(tmp_path, capsys):
    wrong = edited(MLP, tmp_path / "wrong", use_rslora=False)
    merged = merge(BASE, wrong, tmp_path / "merged")
    assert verdict(capsys, BASE, ADAPTER, merged) == (1, ["scaled by 0.5: 6 of 6 parameters"])


def test_an_update_with_the_wrong_sign_or_in_the_wrong_place_is_not_lost(tmp_path, capsys):
    merge(BASE, ADAPTER, tmp_path / "merged")
    swapped = verdict(capsys, tmp_path / "merged", ADAPTER, BASE)
    assert swapped == (1, ["scaled by -1: 6 of 6 parameters"])
    base = load_file(BASE / "model.safetensors")
    right = load(BASE, ADAPTER).merge_and_unload().state_dict()
    permuted = {name: w + (right[name] - w).roll(1, 0) for name, w in base.items()}
    (tmp_path / "permuted").mkdir()
    save_file(permuted, tmp_path / "permuted" / "model.safetensors")
    assert verdict(capsys, BASE, ADAPTER, tmp_path / "permuted") == (
        1,
        ["changed: 6 of 6 parameters"],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.05])
def test_rounding_in_the_merged_file_is_not_a_loss(dtype, factor, tmp_path, capsys):
    """The update has 0.7 or 0.035 times the norm of W, and bf16 rounds by up to 0.004."""
    adapter = edited(MLP, tmp_path / "adapter", factor)
    merged = merge(BASE, adapter, tmp_path / "merged", dtype)
    assert verdict(capsys, BASE, adapter, merged) == (0, ["survived: 6 of 6 parameters"])


def test_an_update_that_rounding_erases_is_lost(tmp_path, capsys):
    """In bf16, W + s B A rounds to W almost everywhere."""
    adapter = edited(MLP, tmp_path / "adapter", 0.0005)
    merged = merge(BASE, adapter, tmp_path / "merged", torch.bfloat16)
    assert verdict(capsys, BASE, adapter, merged) == (1, ["lost: 6 of 6 parameters"])


def test_an_adapter_with_b_zero_cannot_be_checked(tmp_path, capsys):
    adapter = edited(MLP, tmp_path / "adapter", 0.0)
    assert main([str(BASE), str(adapter), str(BASE)]) == 2
    assert "s B A is zero" in one_line(capsys)


def one_line(capsys) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("lora_conformance merged: ")
    return said


def test_folders_that_cannot_be_compared_give_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = {
        (BASE, ADAPTER, tmp_path / "none"): "none is not a folder",
        (BASE, ADAPTER / "adapter_config.json", BASE): "adapter_config.json is not a folder",
        (BASE, ADAPTER, tmp_path / "empty"): "empty/model.safetensors: cannot be read",
        (BASE, tmp_path / "empty", BASE): "adapter_config.json: cannot be read",
        (BASE, adapter_of("gpt2-attention"), BASE): "fits no parameters of the base",
        (BASE, ADAPTER, base_of("gpt2-attention")): "has no model.layers.0.mlp.down_proj.weight",
        (BASE, edited(MLP, tmp_path / "r", r=3), BASE): "fits no parameters of the base",
        (BASE, edited(MLP, tmp_path / "bias", bias="all"), BASE): "bias 'all' is not supported",
    }
    for folders, message in cases.items():
        assert main([str(folder) for folder in folders]) == 2
        assert message in one_line(capsys)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10" + b"\0" * 30])
def test_a_damaged_file_gives_one_line(content, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert main([str(BASE), str(ADAPTER), str(tmp_path)]) == 2
    assert "is not a safetensors file" in one_line(capsys)
    whole = (BASE / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100_000])
    assert main([str(BASE), str(ADAPTER), str(tmp_path)]) == 2
    assert "is cut short" in one_line(capsys)
