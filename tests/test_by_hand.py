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
X, W = torch.tensor([-1.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
WX = ("-1", "1", "0")
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


def forward(s) -> list[list[str]]:
    return [
        ["A x", f"{s.a[0]} · -1 + {s.a[1]} · 1 = {s.ax[0]}"],
        [
            "z",
            *(f"{wx} + 2 · {b} · {s.ax[0]} = {z}" for wx, b, z in zip(WX, s.b, s.z, strict=True)),
        ],
        ["e^z", *s.e],
    ]


def loss(s) -> list[list[str]]:
    return [
        ["sum", f"{s.e[0]} + {s.e[1]} + {s.e[2]} = {s.sum[0]}"],
        ["p", *(f"{e} / {s.sum[0]} = {p}" for e, p in zip(s.e, s.p, strict=True))],
        ["loss", f"-ln {s.p[0]} = {s.loss[0]}"],
    ]


def backward(s) -> list[list[str]]:
    dot = " + ".join(f"{b} · {g}" for b, g in zip(s.b, s.g, strict=True))
    return [
        ["g", f"{s.p[0]} - 1 = {s.g[0]}", s.g[1], s.g[2]],
        ["dB", *(f"2 · {g} · {s.ax[0]} = {db}" for g, db in zip(s.g, s.db, strict=True))],
        *(["dA", f"2 · ({dot}) · {x} = {da}"] for x, da in zip((-1, 1), s.da, strict=True)),
    ]


def expected() -> list[list[str]]:
    """Return the lines of all worksheets."""
    (one, two, three), merged = two_steps()
    m, root = quotient(one.exact[1], two.exact[1])
    m_a, root_a = quotient(0, two.exact[0])
    rows = [texts(*row) for row in W.tolist()]
    lines = [["x", "-1", "1"], ["A", *one.a]]
    lines += [
        [f"W, B of token {i}", *row, b] for i, (row, b) in enumerate(zip(rows, one.b, strict=True))
    ]
    lines += [*forward(one), *loss(one), *backward(one)]
    lines += [
        [
            "B",
            *(f"0 - 0.2 · {d} / {d.lstrip('-')} = {b}" for d, b in zip(one.db, two.b, strict=True)),
        ]
    ]
    lines += [*forward(two), *loss(two), *backward(two)]
    lines += [
        ["mean of g", f"(0.09 · {one.db[0]} + 0.1 · {two.db[0]}) / 0.19 = {m}"],
        ["its size", f"√((0.999 · {one.db[0]}² + {two.db[0]}²) / 1.999) = {root}"],
        ["B", f"{two.b[0]} - 0.2 · {m} / {root} = {three.b[0]}", *three.b[1:]],
        ["mean of g", f"(0.09 · 0 + 0.1 · {two.da[1]}) / 0.19 = {m_a.lstrip('-')}"],
        ["its size", f"√((0.999 · 0² + {two.da[1]}²) / 1.999) = {root_a}"],
    ]
    m_a = m_a.lstrip("-")
    signs = zip(two.a, "+-", three.a, strict=True)
    lines += [["A", *(f"{a} {sign} 0.2 · {m_a} / {root_a} = {after}" for a, sign, after in signs)]]
    lines += forward(three)
    lines += [["p", f"{three.e[0]} / ({three.e[0]} + {three.e[1]} + {three.e[2]}) = {three.p[0]}"]]
    lines += [["loss", f"-ln {three.p[0]} = {three.loss[0]}"]]
    for i, row in enumerate(rows):
        cells = zip(row, three.a, merged[2 * i :], strict=False)
        lines += [[f"token {i}", *(f"{w} + 2 · {three.b[i]} · {a} = {m}" for w, a, m in cells)]]
    pairs = zip(merged[::2], merged[1::2], three.z, strict=True)
    return [*lines, ["z", *(f"{first} · -1 + {second} · 1 = {z}" for first, second, z in pairs)]]


def value(expression: str) -> float:
    python = re.sub(r"ln ([\d.]+)", r"log(\1)", expression)
    for sign, word in (("·", "*"), ("²", "**2"), ("√", "sqrt"), ("^", "**")):
        python = python.replace(sign, word)
    return eval(python, vars(math))


def test_each_line_has_pytorchs_numbers():
    for line, right in zip(LINES, expected(), strict=True):
        assert line == right


@pytest.mark.parametrize("cell", [c for line in LINES for c in line if "=" in c])
def test_a_calculator_finds_the_printed_value(cell):
    expression, _, result = cell.rpartition(" = ")
    assert shown(value(expression)) == result


@pytest.mark.parametrize("equation", re.findall(r"[√(]*[\d.][\d. ·/)]*= [\d.]*\d", PROSE))
def test_a_calculator_finds_the_values_in_the_text(equation):
    expression, _, result = equation.partition(" = ")
    assert shown(value(expression)) == result


def test_the_text_has_the_numbers_of_the_worksheets():
    (one, two, three), _ = two_steps()
    smallest = one.db[2].lstrip("-")
    moved = shown((float(three.a[0]) - float(two.a[0])) / RATE)
    first_step = ["1", "-1", one.db[0], smallest]
    weights = ["0.9", "0.1", "0.9", "0.1", "0.09", "0.1", "0.19"]
    weights += ["0.999", "0.001", "0.9", "0.1", "0.999", "1", "1.999", "0"]
    roots = ["0", "0.1", "0.19", "0.526", "1", "1.999", "0.707", "0.526", "0.707"]
    quotient_of_a = shown(0.1 / 0.19 / math.sqrt(1 / 1.999))
    assert float(moved) == pytest.approx(float(quotient_of_a), abs=0.003)
    found = re.findall(r"-?\d+(?:\.\d+)?", PROSE)
    assert found == [
        *(shown(RATE), *first_step, shown(RATE)),
        *(one.loss[0], two.loss[0]),
        *(*weights, two.da[1]),
        *(*roots, quotient_of_a, quotient_of_a),
        three.loss[0],
    ]
