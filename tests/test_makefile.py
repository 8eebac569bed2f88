"""Check that text typed after make reaches the commands unchanged."""

import shutil
import subprocess
from pathlib import Path
from shlex import split

import pytest

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Call make in a project whose python prints its arguments, one per line."""
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    for stamp in ("run", "dev", "examples", "notebook"):
        (tmp_path / ".venv" / stamp).touch()
    for name in ("MAKEFLAGS", "MFLAGS", "ARGS"):  # set by an outer make
        monkeypatch.delenv(name, raising=False)

    def make(*arguments: str) -> list[str]:
        command = ["make", "-s", *arguments]
        ended = subprocess.run(command, cwd=tmp_path, check=True, text=True, capture_output=True)
        return ended.stdout.splitlines()

    return make


def test_quotes_and_dollars_are_left_alone(made, tmp_path):
    prompt = 'costs $5, "it\'s" $(shell touch ran) `touch ran` $HOME #'
    said = made("generate", f"PROMPT={prompt}", "OUT=a b$c", "BASE=it's")
    options = ["--base", "it's", "--adapter", "a b$c", "--with-base", "--prompt", prompt]
    assert said == ["generate.py", *options]
    assert not (tmp_path / "ran").exists()
    said = made("train-lora", "BOOK=it's $(X).txt", "ARGS=--lr 1e-3 --r 4")
    book = ["--book", "it's $(X).txt"]
    assert said == [*split("train.py lora --base auto"), *book, *split("--lr 1e-3 --r 4")]


def test_packages_are_installed_into_an_environment_that_exists(made, tmp_path):
    (tmp_path / ".venv" / "run").unlink()
    (tmp_path / ".venv" / "mine").touch()
    installed, train = made("train-lora")[:5], made("train-lora")
    assert installed == split("-m pip install --quiet --editable")
    assert train[0] == "train.py" and (tmp_path / ".venv" / "mine").exists()


def test_a_figure_that_does_not_exist_is_an_error_in_one_line(made, tmp_path):
    experiment = tmp_path / "lesson" / "experiments" / "rates.py"
    experiment.parent.mkdir(parents=True)
    experiment.touch()
    assert made("figures", "ARGS=rates --x 1") == split("-m lesson.experiments.rates --x 1")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        made("figures", "ARGS=nosuch --x 1")
    error, _ = failed.value.stderr.splitlines()  # the last line comes from make
    assert error.startswith("error: ARGS must begin with one of diagram ")
    assert not failed.value.stdout


def test_what_is_not_given_is_the_commands_default(made):
    said = made("train-lora", "RECIPE=best", "LR=1e-3", "R=4", "SEEDS=2")
    assert said == split("train.py lora --base auto --recipe best --lr 1e-3 --r 4 --seed 2")
    assert made("train-full") == ["train.py", "full", "--base", "auto"]
    assert made("train-lora", "ARGS=--book 'a b.txt' c.txt")[4:] == ["--book", "a b.txt", "c.txt"]
    said = made("train-full", "DATA=it's $(X).jsonl")
    assert said[2:] == ["--base", "auto", "--data", "it's $(X).jsonl"]
    assert made("example") == ["-m", "lesson.examples.any_model"]
    said = made("example", "MODEL=it's $(X)", "DATA=c d", "OUT=a b", "ARGS=--steps 3")
    assert said[2:] == ["--model", "it's $(X)", "--data", "c d", "--out", "a b", "--steps", "3"]
    assert made("explore") == split("-m lesson.explore --base auto runs/lora")
    said = made("explore", "ADAPTER=it's $(X)", "BASE=a b", "ARGS=--port 0")
    assert said == ["-m", "lesson.explore", "--base", "a b", "it's $(X)", "--port", "0"]
    notebook = "lesson/notebook/lora_from_scratch.ipynb"
    assert made("notebook", "ARGS=--no-browser") == ["-m", "jupyterlab", notebook, "--no-browser"]
    assert made("parity") == ["-m", "benchmarks.parity"]
    assert made("parity", "BASE=gpt2") == ["-m", "benchmarks.parity", "--base", "gpt2"]
