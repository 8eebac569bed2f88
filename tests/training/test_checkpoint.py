"""Only a complete and matching checkpoint is used. A damaged checkpoint costs some steps."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from tests.runs import arguments, contents, die, refused, run, run_acting
from train import main
from training import checkpoint
from training.checkpoint import CHECKPOINT, PREVIOUS, read_checkpoint, write_checkpoint

OPTIONS = ("--max-steps", 6, "--checkpoint-every", 2)
NAME = "h/0/attn/c_attn/lora_A/weight"
STATE = {
    "parameters": {NAME: torch.arange(12.0).view(3, 4), "b": torch.ones(2).bfloat16()},
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1, "betas": [0.9, 0.999], "params": [0]}],
    },
    "progress": {"step": 4, "best": float("inf")},
    "scaler": {},
    "random": ["00ff", "é"],
}


@pytest.fixture
def argv(base, book, tmp_path) -> list[str]:
    """Return the arguments that resume a run that died in step 4, after a checkpoint."""
    argv = arguments("lora", base, book, tmp_path / "run", *OPTIONS)
    assert run_acting({4: die}, *argv).status == 130
    return [*argv, "--resume"]


def test_a_state_comes_back_as_it_was_and_the_one_before_it_is_kept(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, STATE | {"step": step})
    assert repr(read_checkpoint(tmp_path)) == repr(STATE | {"step": 3})
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, PREVIOUS}
    tensors = load_file(tmp_path / CHECKPOINT)  # a plain safetensors file
    assert torch.equal(tensors[f"parameters.{NAME}"], STATE["parameters"][NAME])
    (tmp_path / CHECKPOINT).unlink()  # as after a kill between two renames
    assert checkpoint.has_checkpoint(tmp_path)
    assert repr(read_checkpoint(tmp_path)) == repr(STATE | {"step": 2})


def test_lists_of_tensors_come_back_and_what_would_not_is_refused(tmp_path):
    state = {"meter": {"losses": [torch.ones(2), [torch.zeros(1)], 3, None, True]}}
    write_checkpoint(tmp_path, state)
    before = contents(tmp_path)
    assert repr(read_checkpoint(tmp_path)) == repr(state)
    keys = ({"tensor": 3}, {"7": 3}, {1.5: 3})
    for value in (torch.tensor(3), torch.ones(1).double(), {1, 2}, *keys):
        with pytest.raises(TypeError, match=r"^a checkpoint cannot store meter\.losses\.1: "):
            write_checkpoint(tmp_path, {"meter": {"losses": [0, value]}})
    assert contents(tmp_path) == before


DAMAGES = {
    "no checksum": lambda data: bytes([2, *[0] * 7]) + b"{}",
    "another type": lambda data: data.replace(b'"F32"', b'"I32"', 1),
    "a pickle": lambda data: pickle.dumps(STATE),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_gives_the_one_before_it_or_is_named(capsys, tmp_path, damage):
    newest = tmp_path / CHECKPOINT
    previous = tmp_path / PREVIOUS
    for step in (1, 2):
        write_checkpoint(tmp_path, STATE | {"step": step})
    good = previous.read_bytes()
    damaged = damage(newest.read_bytes())
    newest.write_bytes(damaged)
    assert read_checkpoint(tmp_path)["step"] == 1
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {newest}: damaged") and warning.count("\n") == 1
    assert contents(tmp_path) == {CHECKPOINT: good}  # the damaged checkpoint never replaces it

    for path in (newest, previous):
        path.write_bytes(damaged)
    with pytest.raises(UserError, match="start again with --overwrite") as refusal:
        read_checkpoint(tmp_path)
    assert all(f"{path}: damaged" in str(refusal.value) for path in (newest, previous))
    assert contents(tmp_path) == {CHECKPOINT: damaged, PREVIOUS: damaged}


def test_a_file_that_cannot_be_read_is_not_called_damaged_nor_replaced(tmp_path):
    """The file is on an unmounted disk."""
    for step in (1, 2):
        write_checkpoint(tmp_path, STATE | {"step": step})
    newest = tmp_path / CHECKPOINT
    newest.unlink()
    newest.symlink_to(tmp_path / "elsewhere")
    previous = (tmp_path / PREVIOUS).read_bytes()
    with pytest.raises(UserError) as refusal:
        read_checkpoint(tmp_path)
    assert str(refusal.value) == f"{newest}: cannot be read (No such file or directory)"
    assert newest.is_symlink() and (tmp_path / PREVIOUS).read_bytes() == previous


def test_a_flipped_bit_anywhere_is_seen(tmp_path):
    write_checkpoint(tmp_path, STATE)
    data = (tmp_path / CHECKPOINT).read_bytes()
    for i in range(0, len(data), 7):
        (tmp_path / CHECKPOINT).write_bytes(data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :])
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(tmp_path)


MISFITS = {
    "a parameter to broadcast": lambda s: s["parameters"].update({NAME: torch.zeros(1)}),
    "one parameter more": lambda s: s["parameters"].update({"wte.weight": torch.zeros(2, 2)}),
    "no meter": lambda s: s.pop("meter"),
}


def test_a_whole_checkpoint_that_does_not_fit_is_refused(argv, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for name, change in MISFITS.items():
        state = read_checkpoint(tmp_path / "whole")
        change(state)
        write_checkpoint(tmp_path / "run", state)
        line = refused(tmp_path / "run", *argv)
        assert line.startswith("error: --resume: the checkpoint does not fit this run: "), name


def test_a_lack_of_memory_is_not_blamed_on_the_checkpoint(argv, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", fail)
    before = contents(tmp_path / "run")
    ending = run(main, *argv)
    assert ending.status == 1 and ending.stderr.startswith("error: out of memory; try a smaller")
    assert contents(tmp_path / "run") == before
