"""The exercises: every check refuses the start and accepts docs/solutions.md."""

import math
import re
from types import SimpleNamespace

import pytest

from exercises import __main__ as exercises
from exercises import answers
from training.options import ROOT

SOLUTIONS = re.findall(r"^## (\d+)\..*?^```python\n(.*?)^```",
                       (ROOT / "docs/solutions.md").read_text(), re.MULTILINE | re.DOTALL)


def test_every_exercise_has_a_page_a_check_and_a_solution():
    numbers = [n for n, _ in SOLUTIONS]
    page = (ROOT / "docs/exercises.md").read_text()
    assert [int(n) for n in numbers] == list(exercises.CHECKS) == list(range(1, 13))
    assert re.findall(r"^## (\d+)\.", page, re.MULTILINE) == numbers
    assert re.findall(r"`python -m exercises (\d+)`", page) == numbers


@pytest.mark.parametrize(("n", "block"), SOLUTIONS)
def test_a_check_refuses_the_start_and_accepts_the_solution(n, block):
    check = exercises.CHECKS[int(n)]
    with pytest.raises((exercises.Wrong, NotImplementedError)):
        check(answers)
    solved = vars(answers) | {"math": math}
    exec(block, solved)
    check(SimpleNamespace(**solved))


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    solved = dict(vars(answers))
    exec(dict(SOLUTIONS)["11"], solved)
    monkeypatch.setattr(answers, "accumulate", solved["accumulate"])
    monkeypatch.setattr(answers, "alpha_for", lambda scaling, r, use_rslora: None)  # no return
    monkeypatch.setattr("sys.argv", ["exercises", "1", "3", "12", "11"])
    assert exercises.main() == 1
    assert re.fullmatch(
        "1: not answered yet\n"
        "3: a gradient of norm 0.5, clipped to 1, moved the weights by 1.5e-05 at rate 1, and "
        "should by 0.5\n12: TypeError: .+\n11: passed\n", capsys.readouterr().out)
