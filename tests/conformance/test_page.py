"""docs/conformance.md: its layer passes on the bench, its lines for the vectors print True."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.__main__ import load_implementation
from conformance.bench import run
from conformance.checks import CHECKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "conformance.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def bench(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return [result.outcome for result in run(load_implementation(str(path)))]


def test_the_layer_of_the_page_passes_and_a_mistake_in_it_is_found(tmp_path):
    outcomes = bench(tmp_path, BLOCKS[0])
    counts = [outcomes.count(kind) for kind in ("pass", "FAIL", "skip")]
    assert "{} passed, {} failed, {} skipped".format(*counts) in PAGE
    assert "FAIL" in bench(tmp_path, BLOCKS[0].replace("alpha / r", "alpha"))


def test_the_lines_for_numpy_agree_with_the_vectors(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(BLOCKS[1], {})
    assert capsys.readouterr().out == "True\nTrue\n"


def test_the_table_names_checks():
    table = PAGE[PAGE.index("| package |") : PAGE.index("About the failures")]
    assert set(re.findall(r"`(\w+)`", table)) <= CHECKS.keys()


@pytest.mark.parametrize(
    ("arguments", "status", "printed"),
    [
        (["this_project", "ten_steps"], 0, "1 passed, 0 failed"),
        (["nothing_of_this_name"], 2, "error: nothing_of_this_name"),
    ],
)
def test_the_command(arguments, status, printed):
    done = subprocess.run(
        [sys.executable, "-m", "conformance", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    assert printed in done.stdout + done.stderr
