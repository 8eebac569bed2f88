"""Refuses JSON and safetensors files that are damaged, in one line that says what is wrong."""

import os
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import files
from common.errors import UserError
from common.files import read_json
from data.tokens import load_tokens
from model.tokenizer_files import GPT2, GPT2_SIZE, load_tokenizer
from tests.helpers import assert_refused, tiny_gpt2_directory

SAFETENSORS, FC = "model.safetensors", "transformer.h.1.mlp.c_fc.weight"
TENSORS = {
    "missing": (lambda t: t.pop(FC), "h.1.mlp.c_fc.weight is missing"),
    "unexpected": (lambda t: t.update({"h.0.q\nk": torch.ones(2)}), r"tensor 'h.0.q\nk'"),
    "other rank": (lambda t: t.update({FC: t[FC][None]}), f"{FC} is (1, 32, 128)"),
    "int": (lambda t: t.update({FC: t[FC].int()}), f"{FC} is not a tensor of fp32"),
    "complex": (lambda t: t.update({FC: t[FC] * 1j}), f"{FC} is not a tensor of fp32"),
    "fp8": (lambda t: t.update({FC: t[FC].to(torch.float8_e4m3fn)}), f"{FC} is not a tensor"),
    "nan": (lambda t: t[FC][3, 1].fill_(torch.nan), f"{FC} holds numbers that are not finite"),
    "inf": (lambda t: t[FC][3, 1].fill_(-torch.inf), f"{FC} holds numbers that are not finite"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_wrong_tensors_are_refused_by_name(tmp_path, damage):
    directory, _ = tiny_gpt2_directory(tmp_path)
    tensors, (change, message) = load_file(directory / SAFETENSORS), TENSORS[damage]
    change(tensors)
    save_file(tensors, directory / SAFETENSORS)
    assert_refused(directory, SAFETENSORS, message)


def test_a_safetensors_file_cut_or_of_something_else_is_refused(tmp_path):
    directory, _ = tiny_gpt2_directory(tmp_path)
    whole = (directory / SAFETENSORS).read_bytes()
    cut = [whole[: int(share * len(whole))] for share in (0, 0.001, 0.5, 0.99)]
    for content in (*cut, b"<!DOCTYPE html>\n" * 99, b"\xff" * 999, b"PK\3\4" * 99):
        (directory / SAFETENSORS).write_bytes(content)
        assert_refused(directory, SAFETENSORS, "damaged")


def test_a_huge_header_is_refused_unread(tmp_path):
    directory, _ = tiny_gpt2_directory(tmp_path)
    with open(directory / SAFETENSORS, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # sparse
    began = time.process_time()
    assert_refused(directory, SAFETENSORS, "damaged", "header too large")
    assert time.process_time() - began < 2


@pytest.mark.parametrize("kind", ["directory", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, kind):
    """A pipe would wait and a device may never end."""
    base, _ = tiny_gpt2_directory(tmp_path)
    for name in (SAFETENSORS, "config.json"):
        (base / name).unlink()
        (base / name).mkdir() if kind == "directory" else (base / name).symlink_to(os.devnull)
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(not a regular file\)$"):
            load_tokens(base / name, load_tokenizer(GPT2, GPT2_SIZE))
        assert_refused(base, name, ": cannot be read (not a regular file)")


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 500_000, b'{"x": ' * 99_999, b" " * (2 << 20), None,
    b'{"r": ' + b"9" * 9999 + b"}",
], ids=range(10))
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 500


def test_a_json_file_larger_than_any_of_settings_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    path = tmp_path / "config.json"
    path.write_text('{"x": 123}')
    assert read_json(path) == {"x": 123}
    path.write_text('{"x": 1234}')
    with pytest.raises(UserError, match="larger than 10 bytes"):
        read_json(path)
