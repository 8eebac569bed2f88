"""The pages: the layer of README.md passes the bench, and names of checks exist.
The command of the bench.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_conformance.__main__ import load_implementation, main
from lora_conformance.bench import run
from lora_conformance.checks import CHECKS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "conformance"
OURS, PEFT = (str(FOLDER / "results" / f"bench_{name}.py") for name in ("this_project", "peft"))
PAGE = (FOLDER / "lora_conformance" / "README.md").read_text()
[LAYER] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def bench(tmp_path, text, names=()):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return [result.outcome for result in run(load_implementation(str(path)), names)]


def test_the_layer_of_the_page_passes_and_a_mistake_in_it_is_found(tmp_path):
    outcomes = bench(tmp_path, LAYER)
    counts = [outcomes.count(kind) for kind in ("pass", "FAIL", "skip")]
    assert "{} passed, {} failed, {} skipped".format(*counts) in PAGE
    mistaken = LAYER.replace("alpha / r", "alpha")
    assert bench(tmp_path, mistaken, ["update_is_alpha_over_r"]) == ["FAIL"]


def test_the_pages_count_the_checks():
    assert f"a bench of {len(CHECKS)} checks" in PAGE
    assert f"**A bench** of {len(CHECKS)} checks" in (ROOT / "docs" / "conformance.md").read_text()


RESULTS = (FOLDER / "results" / "results.md").read_text()
FAILURES = re.findall(
    r"^```python\n# ([\w-]+) .*?Checks?: ((?:[\w, ]|\n# )+).*?\n(.*?)^```",
    (FOLDER / "results" / "failures.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


def rows():
    """Return the names of each package's failed checks in the table."""
    table = [line.split(" | ") for line in RESULTS.splitlines() if line.startswith("| ")]
    header, *rest = table
    column = header.index("failed checks")
    return {row[0].strip("| "): set(re.findall(r"`(\w+)`", row[column])) for row in rest}


def test_each_failure_of_the_table_is_shown_by_hand():
    assert set.union(*rows().values()) <= CHECKS.keys()
    shown = {}
    for package, checks, _ in FAILURES:
        shown.setdefault(package, set()).update(re.findall(r"\w+", checks))
    assert shown == {package: checks for package, checks in rows().items() if checks}


def test_each_failure_takes_at_most_15_lines():
    for block in re.findall(
        r"^```.*?^```", (FOLDER / "results" / "failures.md").read_text(), re.M | re.S
    ):
        assert sum(map(bool, block.splitlines())) <= 15, block


@pytest.mark.parametrize("code", [code for package, _, code in FAILURES if package == "peft"])
def test_the_failures_of_peft_print_what_was_seen(tmp_path, code):
    command = [sys.executable, "-W", "ignore", "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    [seen] = re.findall(r"# seen: (.+?)\. Expected: ", code)
    assert ended.stdout.replace("\n", ", ") == f"{seen}, "


def test_the_command(capsys):
    assert main([OURS, "ten_steps"]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    assert main([PEFT, "state_dict_while_merged"]) == 1
    assert "microsoft/LoRA #190" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.count("catches: ") == len(CHECKS)


def test_a_run_without_a_pass_fails(tmp_path, capsys):
    (tmp_path / "empty.py").touch()
    assert main([str(tmp_path / "empty.py")]) == 1
    assert capsys.readouterr().out.endswith(
        f"0 passed, 0 failed, {len(CHECKS)} skipped: nothing passed, so the run fails\n"
    )


def test_expected_failures(tmp_path, capsys):
    listed = tmp_path / "expected.txt"
    listed.write_text("state_dict_while_merged  # PEFT saves in another way\n")
    arguments = [PEFT, "ten_steps", "state_dict_while_merged", "--expected-failures", str(listed)]
    assert main(arguments) == 0
    assert "xfail    state_dict_while_merged: " in capsys.readouterr().out
    listed.write_text("ten_steps\nstate_dict_while_merged")
    assert main(arguments) == 1
    assert "XPASS    ten_steps" in capsys.readouterr().out
    listed.write_text(lacks := "slices_of_unequal_widths")
    assert main([*arguments[:2], lacks, *arguments[3:]]) == 0
    printed = capsys.readouterr().out
    assert "XSKIP    slices_of_unequal_widths: " in printed
    assert "1 skipped although a failure was expected" in printed


def test_a_level_and_required_checks(tmp_path, capsys):
    assert main([PEFT, "--level", "interface"]) == 1
    printed = capsys.readouterr().out
    assert "\ninterface: 1 passed, 4 failed, 0 skipped\n" in printed
    assert "mathematics" not in printed
    names = ["ten_steps", "tied_head", "slices_of_unequal_widths"]
    assert main([OURS, *names]) == 0
    listed = tmp_path / "required.txt"
    listed.write_text("tied_head  # refused\nslices_of_unequal_widths  # skipped\n")
    assert main([OURS, *names, "--required", str(listed)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL     tied_head: " in printed
    assert "FAIL     slices_of_unequal_widths: wrap has no widths\n" in printed


def test_a_pager_that_ends_early_gives_no_traceback():
    command = f"{sys.executable} -m lora_conformance --list | head -1"
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    ended = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert ended.stderr == ""


def test_a_file_imports_its_neighbours(tmp_path):
    (tmp_path / "its_layer.py").write_text(LAYER)
    (tmp_path / "its_bench.py").write_text("from its_layer import factors, wrap")
    assert main([str(tmp_path / "its_bench.py"), "start_of_a"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def wrap(:", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("\nx = 1 / 0", "ZeroDivisionError: division by zero (mine.py, line 2)"),
        ("import sys; sys.exit(0)", "SystemExit: 0 (mine.py, line 1)"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, capsys, content, message):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "mine.py")])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "mine.py" in last
    assert message in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing_of_this_name"], "did you mean nothing_of_this_name.py?"),
        (["nowhere.py"], "No such file or directory"),
        ([OURS, "ten_step"], "there is no check 'ten_step'"),
        ([OURS, "--expected-failures", "nowhere"], "No such file or directory"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_page_of_bugs_names_checks():
    text = (ROOT / "docs" / "bugs.md").read_text()
    names = re.findall(r"On the bench: `(\w+)`", text)
    assert names and set(names) <= CHECKS.keys()
