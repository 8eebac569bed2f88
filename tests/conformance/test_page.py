"""docs/conformance.md: its layer passes the bench, and its lines for the vectors print True."""

import re
from pathlib import Path

import pytest

from conformance.__main__ import load_implementation, main
from conformance.bench import run
from conformance.checks import CHECKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "conformance.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def bench(tmp_path, text, names=()):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return [result.outcome for result in run(load_implementation(str(path)), names)]


def test_the_layer_of_the_page_passes_and_a_mistake_in_it_is_found(tmp_path):
    outcomes = bench(tmp_path, BLOCKS[0])
    counts = [outcomes.count(kind) for kind in ("pass", "FAIL", "skip")]
    assert "{} passed, {} failed, {} skipped".format(*counts) in PAGE
    mistaken = BLOCKS[0].replace("alpha / r", "alpha")
    assert bench(tmp_path, mistaken, ["update_is_alpha_over_r"]) == ["FAIL"]


def test_the_lines_for_numpy_agree_with_the_vectors(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(BLOCKS[1], {})
    assert capsys.readouterr().out == "True\nTrue\n"


def test_the_table_names_checks():
    table = PAGE[PAGE.index("| package |") : PAGE.index("About the failures")]
    assert set(re.findall(r"`(\w+)`", table)) <= CHECKS.keys()


def test_the_command(capsys):
    assert main(["this_project", "ten_steps"]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    assert main(["peft", "state_dict_while_merged"]) == 1
    assert "microsoft/LoRA #190" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.count("catches: ") == len(CHECKS)
    with pytest.raises(SystemExit, match="2"):
        main(["nothing_of_this_name"])
    assert "error: nothing_of_this_name" in capsys.readouterr().err


def test_the_pages_of_bugs_and_exercises_name_checks():
    for page in ("bugs.md", "exercises.md"):
        text = (ROOT / "docs" / page).read_text().replace("[bench](conformance.md)", "bench")
        names = re.findall(r"On the bench: `(\w+)`", text)
        assert names and set(names) <= CHECKS.keys()
