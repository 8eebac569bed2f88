"""No command overwrites its inputs, whatever name or link leads `--out` to them."""

import os
import shutil

import pytest

from adapters import merge
from lora.save import WEIGHTS
from tests.runs import arguments, contents, one_line, questions, refused, run, trained
from train import main

SHORT = ("--max-steps", 2, "--overwrite")


def soft_link_back(directory, out):
    """Replace the base's weights by a link to a file in `--out`."""
    out.mkdir()
    (out / "metrics.jsonl").touch()
    (directory / "model.safetensors").rename(out / "model.safetensors")
    (directory / "model.safetensors").symlink_to(out / "model.safetensors")


def hard_link(directory, out):
    out.mkdir()
    (out / "metrics.jsonl").touch()
    os.link(directory / "model.safetensors", out / "model.safetensors")


@pytest.mark.parametrize("alias", [soft_link_back, hard_link])
def test_overwriting_the_base_by_another_name_is_refused(base, book, tmp_path, alias):
    copy = shutil.copytree(base, tmp_path / "base")
    (copy / "metrics.jsonl").touch()  # looks like a run
    out = tmp_path / "out"
    alias(copy, out)
    before = contents(copy)
    line = refused(out, *arguments("full", copy, book, out, *SHORT))
    assert f"--out {out}: " in line and "is an input of --base" in line
    assert contents(copy) == before


def test_overwriting_another_input_by_a_link_is_refused(base, book, adapter, tmp_path):
    """A file that `--overwrite` would remove from the run is also the input."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").touch()
    own_book = shutil.copy(book, tmp_path / "book.txt")
    data = questions(tmp_path / "data.jsonl")
    more = questions(tmp_path / "more.jsonl")
    for source, options, read, name in (
        (own_book, ("--book", own_book), own_book, "metrics.jsonl"),
        (own_book, ("--init-adapter", adapter), adapter / WEIGHTS, WEIGHTS),
        (data, ("--data", data), data, "metrics.jsonl"),
        (data, ("--val-data", more), more, "metrics.jsonl"),
    ):
        os.link(read, out / name)
        argv = arguments("lora", base, source, out, *SHORT, "--block-size", 64, *options)
        assert f"{name} is an input of {options[0]} ({read})" in refused(out, *argv)
        (out / name).unlink()


def test_merge_writes_into_no_existing_directory(base, adapter, tmp_path):
    base_link = tmp_path / "base-link"
    adapter_link = tmp_path / "adapter-link"
    base_link.symlink_to(base)
    adapter_link.symlink_to(adapter)
    before = contents(base) | contents(adapter)
    for out in (base_link, adapter, adapter_link):
        ending = run(merge.main, "--base", base, "--adapter", adapter, "--out", out)
        assert "exists already; name a new directory" in one_line(ending, 2)
    assert contents(base) | contents(adapter) == before


def test_a_model_that_no_run_wrote_is_left_alone(base, book, adapter):
    for option in ("--resume", "--overwrite"):
        argv = arguments("lora", base, book, adapter, option)
        assert "but no run; name another directory" in refused(adapter, *argv)


def test_overwrite_replaces_a_run_that_has_only_metrics(base, book, tmp_path):
    """A run killed after its first best model, or while it was overwritten, has few files."""
    out = tmp_path / "run"
    trained("lora", base, book, out, "--max-steps", 1)
    for name in ("run.json", "checkpoint.safetensors"):
        (out / name).unlink()
    assert run(main, *arguments("full", base, book, out, *SHORT)).status == 0
    assert "adapter_config.json" not in contents(out)
