"""Damaged files of tensors and of JSON are refused in one line with the reason."""

import struct

import torch
from safetensors.torch import save_file

from common.files import read_json
from storage.tensors import read_tensors
from tests.helpers import refusal

W, B = "h.0.c_fc.weight", "h.1.c_fc.bias"
SHAPES = {W: (3, 4), B: (5,)}


def read_all(path):
    return dict(read_tensors(path, SHAPES))


def good_tensors():
    return {W: torch.arange(12.0).view(3, 4), B: torch.ones(5)}


DAMAGED = [
    (lambda t: t.pop(B), f"tensor {B} is missing (1 in all)"),
    (lambda t: t.update({f"_orig_mod.{B}": t[B]}), f"unexpected tensor '_orig_mod.{B}'"),
    (lambda t: t.update({"x\ny" * 333: t[B]}), r"unexpected tensor 'x\nyx"),
    (lambda t: t.update({W: t[W].t()}), f"{W} has shape (4, 3), not (3, 4)"),
    (lambda t: t.update({W: t[W].flatten()}), f"{W} has shape (12,), not"),
    (lambda t: t[W][2].fill_(torch.nan), f"{W} contains numbers that are not finite"),
    (lambda t: t[W][2].fill_(torch.inf), f"{W} contains numbers that are not finite"),
    (lambda t: t.update({W: t[W].long()}), f"{W} is not a tensor of fp32, fp16 or bf16 (torch.int"),
]


def test_wrong_tensors_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(good_tensors(), path)
    assert all(torch.equal(t, good_tensors()[name]) for name, t in read_all(path).items())
    for change, reason in DAMAGED:
        tensors = good_tensors()
        change(tensors)
        save_file({key: x.contiguous().clone() for key, x in tensors.items()}, path)
        assert refusal(path, read_all).startswith(reason)


def test_files_that_are_cut_or_of_something_else_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(good_tensors(), path)
    whole = path.read_bytes()
    for content in (
        *(whole[: int(share * len(whole))] for share in (0, 0.01, 0.1, 0.5, 0.999)),
        b"<!DOCTYPE html>\n" * 99,
        b"\xff" * 999,
        b"PK\x03\x04" * 99,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 14) + b'{"x\n": "\x1b"}',
        struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
    ):
        path.write_bytes(content)
        assert "damaged, or not a file of tensors (" in refusal(path, read_all)
    path.write_bytes(b"")
    assert "header" in refusal(path, read_all)  # the reason of the reader


def test_what_cannot_be_opened_is_refused_with_the_systems_reason(tmp_path):
    for read in (read_all, read_json):
        assert refusal(tmp_path, read) == "cannot be read (Is a directory)"
        assert refusal(tmp_path / "none", read) == "cannot be read (No such file or directory)"


def test_a_file_that_is_not_a_json_object_is_refused(tmp_path):
    path = tmp_path / "config.json"
    assert "cannot be read" in refusal(path, read_json)
    for content in (
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 500_000,
        b'{"x": ' * 99_999,
        b" " * (2 << 20),
        b'{"r": ' + b"9" * 9999 + b"}",
    ):
        path.write_bytes(content)
        assert "JSON" in refusal(path, read_json)
