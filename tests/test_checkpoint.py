"""Model directories: each layout they come in, what is refused, and what transformers reads."""

import contextlib
import copy
import io
import logging
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from errors import RunError
from model.checkpoint import has_weights, load_gpt2, save_gpt2
from tests.helpers import assert_refused, relative_difference, tiny_gpt2_directory, token_ids

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
IDS = token_ids(317, 2, 64)


def save_zip(tensors, path):
    torch.save(tensors, path)


def save_legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_safetensors(tensors, path):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


FORMATS = {"safetensors": (SAFETENSORS, save_safetensors), "zip": (PICKLE, save_zip),
           "legacy": (PICKLE, save_legacy)}


def rewrite(directory: Path, tensors: dict, file_format: str) -> Path:
    """Replace the directory's weights; returns the new file."""
    (directory / SAFETENSORS).unlink()
    name, save = FORMATS[file_format]
    save(tensors, directory / name)
    return directory / name


def hub_layout(tensors):
    """No prefix, no head; the causal masks that the hub's and older files carry."""
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
    "head alone": lambda t: {"lm_head.weight": t.pop("transformer.wte.weight"), **t},
    "old transformers": lambda t: {f"transformer.{key}": x for key, x in hub_layout(t).items()},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_file_layout_gives_the_logits_of_transformers(tmp_path, layout, file_format, dtype):
    directory, theirs = tiny_gpt2_directory(tmp_path)
    stored = {key: t.to(dtype) for key, t in load_file(directory / SAFETENSORS).items()}
    rewrite(directory, LAYOUTS[layout](stored), file_format)
    expected = copy.deepcopy(theirs).to(dtype).float()(IDS).logits
    model = load_gpt2(directory)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative_difference(model(IDS), expected) < 1e-5


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_loaded_model_does_not_change_with_its_file(tmp_path, file_format):
    directory, _ = tiny_gpt2_directory(tmp_path)
    path = rewrite(directory, load_file(directory / SAFETENSORS), file_format)
    model = load_gpt2(directory)
    before = model(IDS)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model(IDS), before)


def with_value(key, value):
    def damage(tensors):
        tensors[key].view(-1)[3] = value
    return damage


FC, WTE = "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"
DAMAGED_TENSORS = {
    "missing": (lambda t: t.pop(FC), "h.1.mlp.c_fc.weight is missing"),
    "missing block": (lambda t: [t.pop(k) for k in list(t) if ".h.1." in k], "holds 1 blocks"),
    "block too many": (lambda t: t.update({"h.2.ln_1.bias": torch.ones(32)}), "holds 3 blocks"),
    "unexpected": (lambda t: t.update({"h.0.q\nk": torch.ones(2)}), r"tensor 'h.0.q\nk'"),
    "transposed": (lambda t: t.update({FC: t[FC].t()}), f"{FC} is (128, 32)"),
    "small vocabulary": (lambda t: t.update({WTE: t[WTE][:-1]}), f"{WTE} is (316, 32)"),
    "other rank": (lambda t: t.update({FC: t[FC][None]}), f"{FC} is (1, 32, 128)"),
    "int": (lambda t: t.update({FC: t[FC].int()}), f"{FC} is not a tensor of fp32"),
    "complex": (lambda t: t.update({FC: t[FC] * 1j}), f"{FC} is not a tensor of fp32"),
    "fp8": (lambda t: t.update({FC: t[FC].to(torch.float8_e4m3fn)}), f"{FC} is not a tensor"),
    "nan": (with_value(FC, torch.nan), f"{FC} holds numbers that are not finite"),
    "inf": (with_value(WTE, -torch.inf), f"{WTE} holds numbers that are not finite"),
    "untied": (lambda t: t.update({"lm_head.weight": t[WTE] + 1e-3}), "differs from wte.weight"),
    "twice": (lambda t: t.update({"wte.weight": t[WTE].clone()}), "holds wte.weight twice"),
}
UNKNOWN_TO_A_PICKLE = {"complex": "torch ComplexFloatStorage", "fp8": "_rebuild_tensor_v3"}


@pytest.mark.parametrize("file_format", ["safetensors", "zip"])
@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_wrong_tensors_are_refused_by_name(tmp_path, damage, file_format):
    directory, _ = tiny_gpt2_directory(tmp_path)
    tensors = load_file(directory / SAFETENSORS)
    change, message = DAMAGED_TENSORS[damage]
    change(tensors)
    path = rewrite(directory, tensors, file_format)
    if file_format == "zip":
        message = UNKNOWN_TO_A_PICKLE.get(damage, message)
    assert_refused(directory, path.name, message)


@pytest.mark.parametrize(("stand_in", "reason"), [
    (torch.ones(1).expand(32, 128), "a view larger than its storage"),  # few bytes, any shape
    (torch.ones(32, 128).to_sparse(), "_rebuild_sparse_tensor"),
    (torch.ones(32, 128, device="meta"), "_rebuild_meta_tensor_no_storage"),
    ([1.0, 2.0], FC),
], ids=["view of one number", "sparse", "meta", "list"])
def test_a_pickle_of_anything_but_stored_numbers_is_refused(tmp_path, stand_in, reason):
    directory, _ = tiny_gpt2_directory(tmp_path)
    rewrite(directory, {**load_file(directory / SAFETENSORS), FC: stand_in}, "zip")
    assert_refused(directory, PICKLE, reason)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_truncated_file_is_refused(tmp_path, file_format, share):
    directory, _ = tiny_gpt2_directory(tmp_path)
    path = rewrite(directory, load_file(directory / SAFETENSORS), file_format)
    os.truncate(path, int(share * path.stat().st_size))
    assert_refused(directory, path.name, "damaged")


def torchscript() -> bytes:
    """What torch takes for a TorchScript archive; torch.jit itself is deprecated."""
    file = io.BytesIO()
    torch.save({}, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    return file.getvalue()


@pytest.mark.parametrize("file", [SAFETENSORS, PICKLE])
@pytest.mark.parametrize("content", [
    b"<!DOCTYPE html>\n" * 99, b"\xff" * 999, pickle.dumps([1]), torchscript(),
], ids=["html", "binary", "list", "torchscript"])
def test_a_file_of_something_else_is_refused(tmp_path, file, content):
    directory, _ = tiny_gpt2_directory(tmp_path)
    (directory / SAFETENSORS).unlink()
    (directory / file).write_bytes(content)
    message = assert_refused(directory, file)
    assert "weights_only` set to `False`" not in message  # torch's advice for every pickle


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [
    save_zip, save_legacy, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=4)),
], ids=["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, save, recwarn):
    directory, _ = tiny_gpt2_directory(tmp_path)
    (directory / SAFETENSORS).unlink()
    mark = tmp_path / "it ran"
    save({"transformer.wte.weight": Touch(mark)}, directory / PICKLE)
    assert_refused(directory, PICKLE, "can run code")
    assert not mark.exists()
    assert not recwarn.list
    with contextlib.suppress(Exception):
        torch.load(directory / PICKLE, weights_only=False)
    assert mark.exists()  # the file was what it is meant to be


@pytest.mark.parametrize("name", [SAFETENSORS, PICKLE])
def test_sharded_weights_are_refused_and_not_taken_for_none(tmp_path, name):
    directory, _ = tiny_gpt2_directory(tmp_path)
    (directory / SAFETENSORS).rename(directory / "model-00001-of-00001.safetensors")
    assert not has_weights(directory)
    assert_refused(directory, "", "neither model.safetensors nor pytorch_model.bin")
    (directory / f"{name}.index.json").write_text("{}")
    assert has_weights(directory)
    assert_refused(directory, f"{name}.index.json", "sharded weights are not read", "save")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_saved_model_loads_in_transformers_without_a_warning(tmp_path, dtype, caplog):
    directory, theirs = tiny_gpt2_directory(tmp_path / "in", n_inner=50, resid_pdrop=0.2)
    save_gpt2(load_gpt2(directory), tmp_path / "out", dtype)
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype="auto", output_loading_info=True)
    log.removeHandler(caplog.handler)
    assert not any(info.values())
    assert not caplog.records
    assert again.dtype == (dtype or torch.float32)
    assert (again.config.n_inner, again.config.resid_pdrop) == (50, 0.2)
    expected = theirs.to(dtype or torch.float32).float()(IDS).logits
    assert relative_difference(again.float()(IDS).logits, expected) < 1e-5


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_what_is_saved_is_what_is_loaded(tmp_path, dtype):
    directory, _ = tiny_gpt2_directory(tmp_path / "in", attn_pdrop=0.3, n_inner=50)
    first = load_gpt2(directory)
    save_gpt2(first, tmp_path / "out", dtype)
    save_gpt2(first, tmp_path / "out", dtype)  # in place of what is there
    again = load_gpt2(tmp_path / "out")
    assert again.config == first.config
    for name, parameter in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter.to(dtype or torch.float32).float())


def test_a_saved_file_holds_what_transformers_writes(tmp_path):
    directory, _ = tiny_gpt2_directory(tmp_path / "in")
    save_gpt2(load_gpt2(directory), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", SAFETENSORS]
    theirs = load_file(directory / SAFETENSORS)
    ours = load_file(tmp_path / "out" / SAFETENSORS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with safe_open(tmp_path / "out" / SAFETENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_numbers_out_of_reach_of_fp16_are_not_saved(tmp_path):
    model = load_gpt2(tiny_gpt2_directory(tmp_path / "in")[0])
    with torch.no_grad():
        model.ln_f.bias[0] = 1e5
    with pytest.raises(RunError, match=r"ln_f.bias holds numbers that are not finite in .*16"):
        save_gpt2(model, tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
