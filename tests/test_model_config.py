"""`config.json`: read as transformers reads it, and refused where it is not this GPT-2."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import transformers

from errors import UserError
from model import checkpoint
from model.checkpoint import load_config, load_gpt2
from tests.helpers import assert_refused, tiny_gpt2_directory


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(("field", "value"), [
    ("model_type", "gpt_neo"), ("model_type", None),
    ("n_head", 0), ("n_head", 5), ("n_head", True), ("n_head", 4.0), ("n_layer", -1),
    ("n_embd", "32"), ("n_inner", 0), ("vocab_size", None), ("n_positions", 2**20 + 1),
    ("attn_pdrop", 2), ("embd_pdrop", "0.1"), ("resid_pdrop", -0.1), ("attn_pdrop", False),
    ("layer_norm_epsilon", 1e300), ("n_layer", 513), ("layer_norm_epsilon", [1e-5]),
    ("activation_function", "relu"), ("activation_function", "gelu"),
    ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
    ("add_cross_attention", True), ("tie_word_embeddings", False),
])
def test_a_config_of_another_model_is_refused_by_field(tmp_path, field, value):
    directory, _ = tiny_gpt2_directory(tmp_path)
    edit_config(directory, **{field: value})
    assert_refused(directory, "config.json", field, str(value))


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20), None,
])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, content):
    directory, _ = tiny_gpt2_directory(tmp_path)
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content)
    assert_refused(directory, "config.json")


@pytest.mark.parametrize(("file", "reason", "fields"), [
    ("model.safetensors", "config.json says n_layer 512", {"n_layer": 512}),
    ("model.safetensors", "config.json says", {"vocab_size": 2**20}),
    ("config.json", "GB in fp32; this machine has", {"n_embd": 2**20}),
    ("config.json", "GB in fp32; this machine has", {"n_inner": 2**20, "n_positions": 2**20,
                                                     "vocab_size": 2**20, "n_embd": 2**16}),
])
def test_a_config_too_large_for_the_weights_is_refused_before_it_is_built(
        tmp_path, file, reason, fields):
    directory, _ = tiny_gpt2_directory(tmp_path)
    load_gpt2(directory)  # the first use of the meta device imports half of torch
    edit_config(directory, **fields)
    start = time.monotonic()
    assert_refused(directory, file, reason)
    assert time.monotonic() - start < 2


def test_a_config_without_weights_is_refused_when_memory_cannot_hold_its_model(
        tmp_path, monkeypatch):
    directory, model = tiny_gpt2_directory(tmp_path, n_inner=50)
    size = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(checkpoint, "total_memory", lambda: size)
    assert load_config(directory).n_inner == 50
    monkeypatch.setattr(checkpoint, "total_memory", lambda: size - 1)
    with pytest.raises(UserError, match=r"GB in fp32; this machine has"):
        load_config(directory)


@pytest.mark.parametrize("fields", [
    {},
    {"n_ctx": 16, "n_positions": 32, "dtype": "float16", "a_field_of_tomorrow": [1]},
    {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
     "max_position_embeddings": 99},
    {"n_inner": 50, "embd_pdrop": 0, "layer_norm_epsilon": 1e-3, "initializer_range": 0.1},
])
def test_config_json_means_what_it_means_to_transformers(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for field, value in asdict(load_config(tmp_path)).items():
        assert value == getattr(theirs, field), field
