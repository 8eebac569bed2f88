"""The exercises: every check refuses the start and accepts docs/solutions.md."""

import re
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from lesson.exercises import __main__ as exercises
from lesson.exercises import answers
from training.options import ROOT

perplexity_of = exercises.perplexity_of
SOLUTIONS = re.findall(
    r"^## (\d+)\..*?^```python\n(.*?)^```",
    (ROOT / "docs/solutions.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


@pytest.fixture(autouse=True)
def perplexities(monkeypatch):
    """Take measured perplexities for exercise 12, to save seconds."""
    by_rank = {1: 48.9, 2: 46.7, 4: 45.0, 8: 42.5, 16: 40.5, 32: 38.3}

    def perplexity_of(method, r=1, **options):
        return 41.6 if method == "full" else by_rank[r]

    monkeypatch.setattr(exercises, "perplexity_of", perplexity_of)


def test_every_exercise_has_one_solution():
    assert [int(n) for n, _ in SOLUTIONS] == list(exercises.CHECKS)
    assert (ROOT / "docs/solutions.md").read_text().count("```python") == len(SOLUTIONS)


@pytest.mark.parametrize(("n", "block"), SOLUTIONS)
def test_a_check_refuses_the_start_and_accepts_the_solution(n, block):
    torch.manual_seed(int(n))
    check = exercises.CHECKS[int(n)]
    with pytest.raises((exercises.Wrong, NotImplementedError)):
        check(answers)
    check(solved(block))


def solved(block):
    """Return the answers, with one exercise replaced by its solution."""
    names = dict(vars(answers))
    exec(block, names)
    return SimpleNamespace(**names)


def test_exercise_12_has_the_scale_of_the_pages():
    """A run that hardly trains has the perplexity of the base on every page."""
    untrained = perplexity_of("lora", lr=1e-9, max_steps=1, batch_size=1)
    assert untrained == pytest.approx(54.7, abs=0.05)


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    """The answers are a missing answer, one that raises, and a right one."""
    monkeypatch.setattr(answers, "accumulate", solved(dict(SOLUTIONS)["9"]).accumulate)
    monkeypatch.setattr(answers, "alpha_for", lambda scaling, r, use_rslora: None)  # no return
    assert exercises.main(["2", "3", "9"]) == 1
    missing, raises, right = capsys.readouterr().out.splitlines()
    assert (missing, right) == ("2: not answered yet", "9: passed")
    assert raises.startswith("3: ValueError: lora_alpha None is not a number")
    assert exercises.main(["9"]) == 0
    with pytest.raises(UserError, match="'15' is not a whole number from 1 to 14"):
        exercises.main(["15"])
