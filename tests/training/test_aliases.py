"""No command writes over what it reads, by whatever other name `--out` leads there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import combine, extract, merge
from lora.save import WEIGHTS
from tests.runs import arguments, contents, one_line, questions, refused, run, trained
from train import main

SHORT = ("--max-steps", 2, "--overwrite")


@pytest.fixture
def mine(base, tmp_path) -> Path:
    """A base of the test's own, which looks like a run's."""
    directory = shutil.copytree(base, tmp_path / "mine")
    (directory / "metrics.jsonl").write_text("{}\n")
    return directory


def link_directory(directory: Path, out: Path) -> None:
    out.symlink_to(directory)


def bind_directory(directory: Path, out: Path) -> None:
    out.mkdir()
    bound = subprocess.run(["mount", "--bind", directory, out], capture_output=True)
    if bound.returncode:
        pytest.skip("mount --bind is not allowed here")


def soft_link_back(directory: Path, out: Path) -> None:
    """Let the base's file be a link to a file in `--out`."""
    out.mkdir()
    (directory / "metrics.jsonl").rename(out / "metrics.jsonl")
    (directory / "model.safetensors").rename(out / "model.safetensors")
    (directory / "model.safetensors").symlink_to(out / "model.safetensors")


def hard_links(directory: Path, out: Path) -> None:
    out.mkdir()
    for name in ("metrics.jsonl", "model.safetensors"):
        os.link(directory / name, out / name)


@pytest.fixture
def unmounted(tmp_path) -> Iterator[Path]:
    out = tmp_path / "out"
    yield out
    subprocess.run(["umount", out], capture_output=True)  # fails for the other aliases


@pytest.mark.parametrize("alias", [link_directory, bind_directory, soft_link_back, hard_links])
def test_overwriting_the_base_by_another_name_is_refused(mine, book, unmounted, alias):
    alias(mine, unmounted)
    before = contents(mine)
    argv = arguments("full", mine, book, unmounted, *SHORT)
    line = refused(unmounted, *argv)
    assert f"--out {unmounted}: " in line and "is what --base reads" in line
    assert contents(mine) == before


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("option", ["--book", "--data", "--val-data", "--init-adapter"])
def test_overwriting_another_input_by_a_link_is_refused(
    base, book, adapter, tmp_path, option, kind
):
    """The input is, by a link, a file of the run that `--overwrite` would remove."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    own_book = shutil.copy(book, tmp_path / "book.txt")
    data = questions(tmp_path / "data.jsonl")
    more_data = questions(tmp_path / "more.jsonl")
    source, more, read, name = {
        "--book": (own_book, (), own_book, "metrics.jsonl"),
        "--data": (data, (), data, "metrics.jsonl"),
        "--val-data": (data, (option, more_data), more_data, "metrics.jsonl"),
        "--init-adapter": (book, (option, adapter), adapter / WEIGHTS, WEIGHTS),
    }[option]

    if kind == "hard":
        os.link(read, out / name)
    else:
        read.rename(out / name)
        read.symlink_to(out / name)
    before = read.read_bytes()
    line = refused(out, *arguments("lora", base, source, out, *SHORT, *more))
    assert f"its {name} is what {option} reads ({read})" in line
    assert read.read_bytes() == before


@pytest.mark.parametrize("link", [False, True])
def test_merge_combine_and_extract_write_no_directory_that_holds_something(
    base, adapter, tmp_path, link
):
    """An alias of an input does."""
    out = base
    adapter_out = adapter
    if link:
        out = tmp_path / "link"
        adapter_out = tmp_path / "adapter-link"
        out.symlink_to(base)
        adapter_out.symlink_to(adapter)
    before = contents(base) | contents(adapter)
    commands = (
        (merge.main, "--base", base, "--adapter", adapter, "--out", out),
        (merge.main, "--base", base, "--adapter", adapter, "--out", adapter_out),
        (combine.main, adapter, adapter, "--out", adapter_out),
        (extract.main, "--base", base, "--full", base, "--rank", 1, "--out", out),
    )
    for command in commands:
        assert "exists already; name a new directory" in one_line(run(*command), 2)
    assert contents(base) | contents(adapter) == before


@pytest.mark.parametrize("option", [None, "--overwrite", "--resume"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_that_no_run_wrote_is_left_alone(base, book, adapter, tmp_path, method, option):
    out = {"lora": adapter, "full": tmp_path / "theirs"}[method]
    if method == "full":
        shutil.copytree(base, out)
    held = {"lora": "adapter_config.json", "full": "config.json"}[method]
    argv = arguments(method, base, book, out, "--max-steps", 2)
    if option:
        argv.append(option)
    assert f"contains {held}, but no run; name another directory" in refused(out, *argv)


@pytest.mark.parametrize("mark", ["run.json", "checkpoint.safetensors", "metrics.jsonl"])
def test_overwrite_replaces_a_run_that_any_of_its_own_files_shows(base, book, tmp_path, mark):
    """As when it was killed right after its first best model, or by an --overwrite half-way."""
    out = tmp_path / "run"
    trained("lora", base, book, out, "--max-steps", 2)
    for name in {"run.json", "checkpoint.safetensors", "metrics.jsonl"} - {mark}:
        (out / name).unlink()
    (out / mark).touch()
    if mark == "metrics.jsonl":
        assert (out / mark).stat().st_size
    assert run(main, *arguments("full", base, book, out, *SHORT)).status == 0
    assert "adapter_config.json" not in contents(out)
