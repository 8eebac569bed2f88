"""Compute each number of docs/by-hand.md with PyTorch, and compare it with the page.

A line of a worksheet has a label and cells. A cell is a number, or an expression and its value. A
reader types the rounded numbers of the page, so each expression must give the printed value.
"""

import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "by-hand.md").read_text()
SHEET = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINES = [re.split(r"\s{2,}", line) for sheet in SHEET.findall(PAGE) for line in sheet.splitlines()]
PROSE = re.sub(r"\]\([^)]*\)|`[^`]*`", "", SHEET.sub("", PAGE))
PROSE = PROSE.replace("GPT-2", "").replace("\n", " ")
EQUATIONS = re.findall(r"[√(]*[\d.][\d. ·/)]*= [\d.]*\d", PROSE)
X, W = torch.tensor([-1.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
RATE, SCALING = 0.2, 2


def shown(number: float) -> str:
    """Return a number as the page prints it, with at most three decimals."""
    text = f"{number:.3f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def texts(*numbers: float) -> list[str]:
    return [shown(number) for number in numbers]


@cache
def two_steps() -> tuple[list[SimpleNamespace], list[str]]:
    """Take two steps in PyTorch, and a third pass. Return the numbers of the three passes, and the
    merged weight.
    """
    a, b = nn.Parameter(torch.tensor([[0.4, 0.2]])), nn.Parameter(torch.zeros(3, 1))
    optimizer = torch.optim.AdamW([a, b], lr=RATE, weight_decay=0)
    found = []
    for step in range(3):
        ax = a @ X  # (1,)
        z = W @ X + SCALING * b @ ax  # (3,)
        z.retain_grad()
        loss = F.cross_entropy(z, torch.tensor(0))
        optimizer.zero_grad()
        loss.backward()
        tensors = {"a": a, "b": b, "ax": ax, "z": z, "e": z.exp(), "sum": z.exp().sum()}
        tensors |= {"p": z.softmax(0), "loss": loss, "g": z.grad, "da": a.grad, "db": b.grad}
        found.append(
            SimpleNamespace(**{k: texts(*v.flatten().tolist()) for k, v in tensors.items()})
        )
        found[-1].exact = (a.grad[0, 0].item(), b.grad[0, 0].item())
        if step < 2:
            optimizer.step()
    return found, texts(*(W + SCALING * b @ a).flatten().tolist())


def quotient(first: float, second: float) -> list[str]:
    """Return m / (1 - 0.9^2) and the root of v / (1 - 0.999^2) after two gradients."""
    m = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    root = math.sqrt((0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2))
    return texts(m, root)


def lines_of_a_pass(s) -> list[list[str]]:
    """Return the results of a forward and a backward pass."""
    return [
        ["A x", *s.ax],
        ["z", *s.z],
        ["e^z", *s.e],
        ["sum", *s.sum],
        ["p", *s.p],
        ["loss", *s.loss],
        ["g", *s.g],
        ["dB", *s.db],
        ["dA", s.da[0]],
        ["dA", s.da[1]],
    ]


def expected() -> list[list[str]]:
    """Return the label and the results of each line of all worksheets."""
    (one, two, three), merged = two_steps()
    m, root = quotient(one.exact[1], two.exact[1])
    m_a, root_a = quotient(0, two.exact[0])
    lines = [["x", "-1", "1"], ["A", *one.a]]
    for i, row in enumerate(W.tolist()):
        lines += [[f"W, B of token {i}", *texts(*row), one.b[i]]]
    lines += [*lines_of_a_pass(one), ["B", *two.b]]
    lines += [*lines_of_a_pass(two)]
    lines += [["mean of g", m], ["its size", root], ["B", *three.b]]
    lines += [["mean of g", m_a.lstrip("-")], ["its size", root_a], ["A", *three.a]]
    lines += [["A x", *three.ax], ["z", *three.z], ["e^z", *three.e]]
    lines += [["p", three.p[0]], ["loss", *three.loss]]
    for i in range(3):
        lines += [[f"token {i}", *merged[2 * i : 2 * i + 2]]]
    return [*lines, ["z", *three.z]]


def value(expression: str) -> float:
    python = re.sub(r"ln ([\d.]+)", r"log(\1)", expression)
    for sign, word in (("·", "*"), ("²", "**2"), ("√", "sqrt"), ("^", "**")):
        python = python.replace(sign, word)
    return eval(python, vars(math))


def test_each_line_has_pytorchs_results():
    for (label, *cells), right in zip(LINES, expected(), strict=True):
        assert [label, *(cell.rpartition(" = ")[2] for cell in cells)] == right


@pytest.mark.parametrize("cell", [c for line in LINES for c in line if "=" in c])
def test_a_calculator_finds_the_printed_value(cell):
    expression, _, result = cell.rpartition(" = ")
    assert shown(value(expression)) == result


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_calculator_finds_the_values_in_the_text(equation):
    expression, _, result = equation.partition(" = ")
    assert shown(value(expression)) == result


def test_the_text_repeats_numbers_that_are_computed():
    decimals = re.compile(r"\d\.\d{3}")
    computed = {*decimals.findall(" ".join(SHEET.findall(PAGE) + EQUATIONS))}
    repeated = {*decimals.findall(PROSE)} - {"0.001"}  # 1 - beta2 of AdamW
    assert len(repeated) > 5
    assert repeated <= computed
