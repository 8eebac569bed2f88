"""Model directories: their layouts, refusals, and reading by transformers."""

import copy
import json
import logging
import math
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import RunError
from storage.weights import find_weights, load_config, load_gpt2, save_gpt2
from tests.helpers import refusal, relative_difference, tiny_gpt2_directory, token_ids
from tests.runs import contents

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
FORMATS = {"safetensors": SAFETENSORS, "zip": PICKLE, "legacy": PICKLE}
FC, WTE = "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"
IDS = token_ids(317, 2, 64)


def rewrite(directory: Path, tensors: dict, file_format: str) -> Path:
    """Replace the directory's weights. Return the new file."""
    (directory / SAFETENSORS).unlink()
    path = directory / FORMATS[file_format]
    if file_format == "safetensors":
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=file_format == "zip")
    return path


def hub_layout(tensors):
    """No prefix and no head, but the causal masks of the hub's and older files."""
    stripped = {key.removeprefix("transformer."): t for key, t in tensors.items()}
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    for layer in range(2):
        stripped[f"h.{layer}.attn.bias"] = mask.clone()
        stripped[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return stripped


LAYOUTS = {
    "hub": hub_layout,
    "transformers": dict,
    "with head": lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()},
    "old transformers": lambda t: {f"transformer.{key}": x for key, x in hub_layout(t).items()},
}


@pytest.mark.parametrize(
    ("layout", "file_format", "dtype"),
    [
        ("hub", "safetensors", torch.float32),
        ("transformers", "zip", torch.bfloat16),
        ("with head", "safetensors", torch.float16),
        ("old transformers", "legacy", torch.float32),
    ],
)
@torch.no_grad()
def test_every_file_layout_gives_the_logits_of_transformers(tmp_path, layout, file_format, dtype):
    directory, theirs = tiny_gpt2_directory(tmp_path)
    stored = {key: t.to(dtype) for key, t in load_file(directory / SAFETENSORS).items()}
    path = rewrite(directory, LAYOUTS[layout](stored), file_format)
    model = load_gpt2(directory)
    with open(path, "r+b") as file:  # the loaded model must not depend on its file
        file.write(bytes(path.stat().st_size))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = copy.deepcopy(theirs).to(dtype).float()(IDS).logits
    assert relative_difference(model(IDS), expected) < 1e-5


def test_tensors_of_another_model_are_refused_by_name(tmp_path):
    directory, _ = tiny_gpt2_directory(tmp_path)
    good = load_file(directory / SAFETENSORS)
    for tensors, message in (
        ({k: t for k, t in good.items() if ".h.1." not in k}, "missing (12 in all)"),
        (good | {"wte.weight": good[WTE].clone()}, "unexpected tensor 'wte.w"),
        (good | {"lm_head.weight": good[WTE] + 1e-3}, "differs from wte.w"),
        (good | {FC: good[FC].t()}, f"{FC} has shape (128, 32)"),
    ):
        path = rewrite(directory, tensors, "safetensors")
        assert message in refusal(path, load_gpt2, directory)


class Touch(str):
    """A path. Unpickling it creates the file."""

    def __reduce__(self):
        return Path.touch, (Path(str(self)),)


@pytest.mark.parametrize("file_format", ["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, file_format, recwarn):
    directory, _ = tiny_gpt2_directory(tmp_path)
    mark = tmp_path / "it ran"
    path = rewrite(directory, {WTE: Touch(mark)}, file_format)
    reason = refusal(path, load_gpt2, directory)
    assert "can run code" in reason
    assert "`False`" not in reason and not recwarn.list  # torch's advice for every pickle
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # so the pickle was dangerous


def test_a_pickle_of_something_else_is_refused(tmp_path):
    directory, _ = tiny_gpt2_directory(tmp_path)
    tensors = load_file(directory / SAFETENSORS)
    path = rewrite(directory, tensors, "zip")
    whole = path.read_bytes()
    load_gpt2(directory)
    for odd in ([1.0, 2.0], tensors[FC].to_sparse(), tensors[FC].to("meta")):
        torch.save({**tensors, FC: odd}, path)
        assert "not a file of tensors" in refusal(path, load_gpt2, directory)
    torch.save({**tensors, 3: tensors[FC]}, path)
    assert "not a file of tensors" in refusal(path, load_gpt2, directory)
    for content in (b"", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "not a file of" in refusal(path, load_gpt2, directory)


@pytest.mark.parametrize("name", [SAFETENSORS, PICKLE])
def test_sharded_weights_are_refused_and_not_taken_for_none(tmp_path, name):
    directory, _ = tiny_gpt2_directory(tmp_path)
    (directory / SAFETENSORS).rename(directory / "model-00001-of-00001.safetensors")
    assert find_weights(directory) is None
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(directory, load_gpt2)
    (index := directory / f"{name}.index.json").write_text("{}")
    for read in (find_weights, load_gpt2):
        reason = refusal(index, read, directory)
        assert "sharded weights are not supported" in reason and "save" in reason


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_what_is_saved_is_what_transformers_writes_and_loads(tmp_path, dtype, caplog):
    directory, theirs = tiny_gpt2_directory(tmp_path / "in", n_inner=50, resid_pdrop=0.2)
    tokens = {"bos_token_id": 1, "eos_token_id": 316, "pad_token_id": 2}
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | tokens | {"eos_token_id": 3}))
    out, stored_dtype = tmp_path / "out", dtype or torch.float32
    save_gpt2(load_gpt2(directory), out, dtype, end_of_text=316)
    save_gpt2(load_gpt2(directory), out, dtype, end_of_text=316)  # replaces the files
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype="auto", output_loading_info=True
        )
    log.removeHandler(caplog.handler)
    assert not any(info.values()) and not caplog.records
    assert again.dtype == stored_dtype
    assert (again.config.n_inner, again.config.resid_pdrop) == (50, 0.2)
    assert tokens.items() <= again.config.to_dict().items()
    expected = theirs.to(stored_dtype).float()(IDS).logits
    assert relative_difference(again.float()(IDS).logits, expected) < 1e-5

    assert sorted(os.listdir(out)) == ["config.json", "generation_config.json", SAFETENSORS]
    save_gpt2(load_gpt2(directory), tmp_path / "kept", end_of_text=None)  # the tokenizer lacks it
    assert load_config(tmp_path / "kept").token_ids["eos_token_id"] == 3
    assert load_config(out) == replace(load_config(directory), token_ids=tokens)
    with safe_open(out / SAFETENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    written, given = load_file(out / SAFETENSORS), load_file(directory / SAFETENSORS)
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], given[key].to(stored_dtype)) for key in given)


def test_values_out_of_reach_of_fp16_are_not_saved(tmp_path):
    model, out = load_gpt2(tiny_gpt2_directory(tmp_path / "in")[0]), tmp_path / "out"
    save_gpt2(model, out)
    before = contents(out)
    model.ln_f.bias.data[0] = 1e5
    with pytest.raises(RunError, match=r"ln_f.bias .* finite in torch.float16; not written$"):
        save_gpt2(model, out, torch.float16)
    assert contents(out) == before
    save_gpt2(model, out, torch.bfloat16)  # has the range of fp32
    assert load_gpt2(out).ln_f.bias[0] > 9e4


def test_a_config_of_another_model_is_refused_by_field(tmp_path):
    for field, value in [
        ("model_type", "gpt_neo"),
        ("n_head", 5),
        ("n_head", True),
        ("n_layer", 513),
        ("n_embd", "32"),
        ("n_positions", 2**20 + 1),
        ("attn_pdrop", 2),
        ("activation_function", "relu"),
        ("add_cross_attention", True),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("layer_norm_epsilon", math.inf),
    ]:
        (path := tmp_path / "config.json").write_text(
            json.dumps({"model_type": "gpt2", field: value})
        )
        reason = refusal(path, load_gpt2, tmp_path)
        assert field in reason and str(value) in reason


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "n_ctx": 16,
            "n_positions": 32,
            "dtype": "float16",
            "a_field_of_tomorrow": [1],
            "n_inner": 50,
            "embd_pdrop": 0,
            "layer_norm_epsilon": 1e-3,
            "initializer_range": 0.1,
        },
    ],
)
def test_config_json_means_what_it_means_to_transformers(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = asdict(load_config(tmp_path))
    for field, value in (ours.pop("token_ids") | ours).items():
        assert value == getattr(theirs, field), field


def test_a_model_read_in_bf16_is_the_one_read_in_fp32_and_cast(base):
    found = load_gpt2(base, torch.bfloat16).state_dict()
    for name, tensor in load_gpt2(base).state_dict().items():
        dtype = torch.float32 if ".ln_" in f".{name}" else torch.bfloat16
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name
