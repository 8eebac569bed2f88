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
    options = ["--base", "it's", "--adapter", "a b$c", "--with-base", f"--prompt={prompt}"]
    assert said == ["generate.py", *options]
    assert not (tmp_path / "ran").exists()
    said = made("train-lora", "BOOK=it's $(X).txt", "ARGS=--lr 1e-3 --r 4")
    book = ["--book", "it's $(X).txt"]
    assert said == [*split("train.py lora --base auto"), *book, *split("--lr 1e-3 --r 4")]
