"""The exercises: every check refuses the start and accepts docs/solutions.md."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from lesson.exercises import __main__ as exercises
from lesson.exercises import answers
from training.options import ROOT

SOLUTIONS = re.findall(
    r"^## (\d+)\..*?^```python\n(.*?)^```",
    (ROOT / "docs/solutions.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


def test_every_exercise_has_a_page_a_check_and_a_solution():
    numbers = [n for n, _ in SOLUTIONS]
    page = (ROOT / "docs/exercises.md").read_text()
    assert [int(n) for n in numbers] == list(exercises.CHECKS) == list(range(1, 13))
    assert re.findall(r"^## (\d+)\.", page, re.MULTILINE) == numbers
    assert re.findall(r"`python -m lesson.exercises (\d+)`", page) == numbers


@pytest.mark.parametrize(("n", "block"), SOLUTIONS)
def test_a_check_refuses_the_start_and_accepts_the_solution(n, block):
    check = exercises.CHECKS[int(n)]
    with pytest.raises((exercises.Wrong, NotImplementedError)):
        check(answers)
    solved = vars(answers) | {"math": math}
    exec(block, solved)
    check(SimpleNamespace(**solved))


def keep_a(layer):
    torch.nn.init.uniform_(layer.lora_B.weight, -0.5, 0.5)


def positive(layer):
    torch.nn.init.zeros_(layer.lora_A.weight)
    torch.nn.init.uniform_(layer.lora_B.weight, 0, 0.5)


def count_one_c_proj(n_layer, n_embd, r, target_modules):
    """Count the attention's c_proj, and not the MLP's."""
    if target_modules == ("c_attn",):
        return n_layer * r * 4 * n_embd
    return n_layer * r * 2 * n_embd


def normalise(scaler, optimizer, parameters, loss, clip):
    loss.backward()
    for p in parameters:
        p.grad *= clip / p.grad.norm()
    optimizer.step()


@pytest.mark.parametrize(
    ("n", "name", "wrong", "said"),
    [
        (1, "swap_the_zero", keep_a, "A is not zero"),
        (1, "swap_the_zero", positive, "yours is from 0.00 to 0.50"),
        (6, "RANK", 12, "not a power of two"),
        (6, "RANK", 32, "rank 16 meets it too"),
        (2, "dropout_after_a", lambda layer, x: layer(x), "some of yours are neither"),
        (3, "clipped_step", normalise, "a gradient of norm 0.5, clipped to 1"),
        (5, "count_lora", count_one_c_proj, "6 layers of width 256"),
        (12, "alpha_for", lambda scaling, r, use_rslora: scaling * r, "r 8, use_rslora True"),
    ],
)
def test_a_check_refuses_a_wrong_answer(n, name, wrong, said):
    torch.manual_seed(n)
    with pytest.raises(exercises.Wrong, match=said):
        exercises.CHECKS[n](SimpleNamespace(**{name: wrong}))


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    """An answer not given, a wrong one, one that fails, and a right one."""
    solved = dict(vars(answers))
    exec(dict(SOLUTIONS)["11"], solved)
    monkeypatch.setattr(answers, "accumulate", solved["accumulate"])
    monkeypatch.setattr(answers, "alpha_for", lambda scaling, r, use_rslora: None)  # no return
    assert exercises.main(["1", "3", "12", "11"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "1: not answered yet"
    assert lines[1] == (
        "3: a gradient of norm 0.5, clipped to 1, moved the weights by 1.5e-05 at rate 1, "
        "and should by 0.5"
    )
    assert lines[2].startswith("12: TypeError: ")
    assert lines[3] == "11: passed"


def test_the_command_succeeds_where_all_is_right(capsys, monkeypatch):
    solved = dict(vars(answers))
    exec(dict(SOLUTIONS)["11"], solved)
    monkeypatch.setattr(answers, "accumulate", solved["accumulate"])
    assert exercises.main(["11"]) == 0
    with pytest.raises(UserError, match="'13' is not a whole number from 1 to 12"):
        exercises.main(["13"])
