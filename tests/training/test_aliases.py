"""No command overwrites its inputs, whatever name or link leads `--out` to them."""

import os
import shutil

from lora.save import WEIGHTS
from tests.runs import arguments, contents, questions, refused, run, trained
from train import main

SHORT = ("--max-steps", 2, "--overwrite")


def test_overwriting_the_base_by_a_link_back_is_refused(base, book, tmp_path):
    """The base's weights are a link to a file in `--out`."""
    copy = shutil.copytree(base, tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").touch()  # looks like a run
    (copy / "model.safetensors").rename(out / "model.safetensors")
    (copy / "model.safetensors").symlink_to(out / "model.safetensors")
    line = refused(out, *arguments("full", copy, book, out, *SHORT))
    assert f"--out {out}: " in line and "is an input of --base" in line


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


def test_overwrite_replaces_a_run_that_has_only_metrics(base, book, tmp_path):
    """A run killed after its first best model, or while it was overwritten, has few files."""
    out = tmp_path / "run"
    trained("lora", base, book, out, "--max-steps", 1)
    for name in ("run.json", "checkpoint.safetensors"):
        (out / name).unlink()
    assert run(main, *arguments("full", base, book, out, *SHORT)).status == 0
    assert "adapter_config.json" not in contents(out)
