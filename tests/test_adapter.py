"""Adapter files: what is written, and that nothing else is read."""

import json
import math
import struct
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from model.checkpoint import load_gpt2
from tests.adapters import adapted, refusal_of
from tests.helpers import TINY, relative_difference, tiny_gpt2_directory, token_ids

IDS = token_ids(TINY["vocab_size"], 2, 16)
PREFIX = "base_model.model.transformer.h"
FIRST, LAST = f"{PREFIX}.0.attn.c_attn.lora_A.weight", f"{PREFIX}.1.attn.c_attn.lora_B.weight"


def change_weights(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file({key: x.contiguous().clone() for key, x in tensors.items()}, adapter / WEIGHTS)


def test_the_weights_file_is_pefts(base, tmp_path):
    model, config = adapted(base, ("mlp.c_proj",), dtype=torch.bfloat16, r=4)
    model.to(torch.bfloat16)  # A and B too; they are stored in fp32 all the same
    save_adapter(model, config, tmp_path, "gpt2")
    content = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()} == {
        f"{PREFIX}.{layer}.mlp.c_proj.lora_{part}.weight": ("F32", shape)
        for layer in (0, 1) for part, shape in (("A", [4, 128]), ("B", [32, 4]))}
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_the_config_file_holds_pefts_fields_and_no_others(base, tmp_path):
    save_adapter(*adapted(base, ("c_proj", "c_fc"), r=2, lora_alpha=3, lora_dropout=0.25,
                          use_rslora=True), tmp_path, "gpt2-medium")
    stored = json.loads((tmp_path / CONFIG).read_text())
    assert stored == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2-medium",
        "r": 2, "lora_alpha": 3, "lora_dropout": 0.25, "target_modules": ["c_proj", "c_fc"],
        "fan_in_fan_out": True, "bias": "none", "use_rslora": True, "use_dora": False,
        "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": None, "layers_to_transform": None, "inference_mode": True,
    }
    assert stored.keys() <= peft.LoraConfig().to_dict().keys()


def test_what_is_saved_is_what_is_loaded(base, tmp_path):
    model, config = adapted(base, r=3, lora_alpha=7, lora_dropout=0.1, use_rslora=True)
    save_adapter(model, config, tmp_path, "gpt2")
    loaded = load_gpt2(base)
    assert load_adapter(loaded, tmp_path) == config
    assert torch.equal(loaded(IDS), model(IDS))
    assert relative_difference(loaded(IDS), load_gpt2(base)(IDS)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_are_read_exactly(base, adapter, dtype):
    change_weights(adapter, lambda t: t.update({key: x.to(dtype) for key, x in t.items()}))
    model = load_gpt2(base)
    load_adapter(model, adapter)
    stored = load_file(adapter / WEIGHTS)[LAST]
    read = model.h[1].attn.c_attn.lora_B.weight
    assert read.dtype == torch.float32 and torch.equal(read, stored.float())


# Refused


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("is_directory", [False, True])
def test_a_missing_file_is_named(base, adapter, file, is_directory):
    (adapter / file).unlink()
    if is_directory:
        (adapter / file).mkdir()
    assert "missing" in (said := refusal_of(adapter, file, base)) or "cannot be read" in said


@pytest.mark.parametrize(("shape", "reason"), [
    ({"n_embd": 48}, f"{FIRST} is (4, 32), this base needs (4, 48)"),
    ({"n_layer": 1}, f"unexpected tensor '{PREFIX}.1.attn.c_attn.lora_A.weight'"),
    ({"n_layer": 3}, f"tensor {PREFIX}.2.attn.c_attn.lora_A.weight is missing"),
])
def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, shape, reason):
    other, _ = tiny_gpt2_directory(tmp_path / "other", **shape)
    assert refusal_of(adapter, WEIGHTS, other).startswith(reason)


ORIG_MOD = LAST.replace("h.1", "_orig_mod.h.1")  # as torch.compile renames what it wraps
DAMAGED_TENSORS = {
    "missing": (lambda t: t.pop(LAST), f"tensor {LAST} is missing"),
    "none": (lambda t: t.clear(), f"tensor {FIRST} is missing"),
    "renamed": (lambda t: t.update({ORIG_MOD: t.pop(LAST)}), f"tensor {LAST} is missing"),
    "extra": (lambda t: t.update({ORIG_MOD: t[LAST]}), f"unexpected tensor {ORIG_MOD!r}"),
    "extra line": (lambda t: t.update({"x\ny": t[LAST]}), "unexpected tensor 'x\\ny'"),
    "extra long": (lambda t: t.update({"x" * 999: t[LAST]}), "unexpected tensor 'xxx"),
    "other rank": (lambda t: t.update({LAST: t[LAST][:, :3]}), f"{LAST} is (96, 3)"),
    "transposed": (lambda t: t.update({LAST: t[LAST].t()}), f"{LAST} is (4, 96)"),
    "flat": (lambda t: t.update({LAST: t[LAST].flatten()}), f"{LAST} is (384,)"),
    "empty": (lambda t: t.update({LAST: t[LAST][:0]}), f"{LAST} is (0, 4)"),
    "NaN": (lambda t: t[LAST][-1].fill_(math.nan), f"{LAST} holds numbers that are not finite"),
    "infinity": (lambda t: t[FIRST][0].fill_(math.inf), f"{FIRST} holds numbers that are not"),
    **{str(dtype): (lambda t, dtype=dtype: t.update({LAST: t[LAST].to(dtype)}), f"{LAST} holds")
       for dtype in (torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_wrong_tensors_are_refused_by_name(base, adapter, damage):
    change, reason = DAMAGED_TENSORS[damage]
    change_weights(adapter, change)
    assert refusal_of(adapter, WEIGHTS, base).startswith(reason)


def test_tensors_of_another_rank_than_the_configs_are_refused(base, adapter):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"r": 5}))
    assert refusal_of(adapter, WEIGHTS, base) == f"{FIRST} is (4, 32), this base needs (5, 32)"


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(base, adapter, share):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: int(share * len(content))])
    assert "truncated" in refusal_of(adapter, WEIGHTS, base)


@pytest.mark.parametrize("content", [
    b"<!DOCTYPE html>\n" * 99,
    b"PK\x03\x04" * 99,
    struct.pack("<Q", 2**63) + b"{}",  # a header longer than memory
    struct.pack("<Q", 1 << 30) + b"{}",
    struct.pack("<Q", 14) + b'{"x\n": "\x1b"}',
    struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
])
def test_a_file_of_something_else_is_refused(base, adapter, content):
    (adapter / WEIGHTS).write_bytes(content)
    assert "not a safetensors file" in refusal_of(adapter, WEIGHTS, base)


def test_an_oversized_header_is_refused_unread(base, adapter):
    with open(adapter / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # sparse
    began = time.perf_counter()
    refusal_of(adapter, WEIGHTS, base)
    assert time.perf_counter() - began < 5
