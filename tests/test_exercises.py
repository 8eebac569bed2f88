"""The exercises: every check refuses the start and accepts docs/solutions.md."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from lesson.exercises import __main__ as exercises
from lesson.exercises import answers
from lora.quantised import nf4_levels
from training.options import ROOT

perplexity_of = exercises.perplexity_of
TINY = {"max_steps": 2, "batch_size": 2, "block_size": 16, "val_fraction": 0.01}
SOLUTIONS = re.findall(
    r"^## (\d+)\..*?^```python\n(.*?)^```",
    (ROOT / "docs/solutions.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


@pytest.fixture(autouse=True)
def perplexities(monkeypatch):
    """Take exercise 12's perplexities from the stored results, to save seconds."""
    stored = json.loads((ROOT / "docs/figures/meeting_rank.json").read_text())["results"]

    def perplexity_of(method, r=1, **options):
        return stored["full"]["1.5e-4"] if method == "full" else stored["alpha = 2 r"][str(r)]

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


def keep_a(layer):
    torch.nn.init.uniform_(layer.lora_B.weight, -0.5, 0.5)


def count_one_c_proj(n_layer, n_embd, r, target_modules):
    """Count the attention's c_proj but not the MLP's c_proj."""
    if target_modules == ("c_attn",):
        return n_layer * r * 4 * n_embd
    return n_layer * r * 2 * n_embd


def normalise(scaler, optimizer, parameters, loss, clip):
    loss.backward()
    for p in parameters:
        p.grad *= clip / p.grad.norm()
    optimizer.step()


def largest_not_largest_size(weight, levels, block):
    """Divide by max w instead of max |w|."""
    blocks = weight.view(-1, block or weight.numel())
    largest = blocks.amax(1, keepdim=True)
    codes = (blocks[..., None] / largest[..., None] - levels).abs().argmin(-1)
    return (levels[codes] * largest).view_as(weight)


@pytest.mark.parametrize(
    ("n", "name", "wrong", "said"),
    [
        (2, "swap_the_zero", keep_a, "A is not zero"),
        (12, "RANK", 32, "rank 16 also reaches full"),
        (7, "dropout_after_a", lambda layer, x: layer(x), "some of your updates are neither"),
        (10, "clipped_step", normalise, "a gradient of norm 0.5, clipped to 1"),
        (1, "count_lora", count_one_c_proj, "6 layers of width 256"),
        (3, "alpha_for", lambda scaling, r, use_rslora: scaling * r, "r 8, use_rslora True"),
        (13, "quantise_by_absmax", largest_not_largest_size, "blocks of 64, an outlier"),
        (14, "smallest_block", lambda bits, double: 64, "blocks of 128, not 64"),
    ],
)
def test_a_check_refuses_a_wrong_answer(n, name, wrong, said):
    torch.manual_seed(n)
    otherwise_right = solved(dict(SOLUTIONS)[str(n)])
    setattr(otherwise_right, name, wrong)
    with pytest.raises(exercises.Wrong, match=said):
        exercises.CHECKS[n](otherwise_right)


def test_exercise_12_measures_a_run():
    measured = [perplexity_of("lora", lr=lr, **TINY) for lr in (1e-9, 3e-3)]
    assert 50 < measured[1] < measured[0] - 0.1


def test_exercise_12_has_the_scale_of_the_pages():
    """A run that hardly trains has the perplexity of the base on every page."""
    untrained = perplexity_of("lora", lr=1e-9, max_steps=1, batch_size=1)
    assert untrained == pytest.approx(54.7, abs=0.05)


def test_the_table_of_exercise_13_is_what_its_solution_computes():
    quantise_by_absmax = solved(dict(SOLUTIONS)["13"]).quantise_by_absmax
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    outlier = weight.clone()
    outlier[0, 0] = 13
    rows = []
    for label, original in (("NF4", weight), ("NF4, one weight set to 13", outlier)):
        row = [label]
        for block in (None, 64, 16):
            result = quantise_by_absmax(original, nf4_levels(), block)
            row.append(f"{100 * exercises.relative_error(result, original):.1f}")
        rows.append(f"| {' | '.join(row)} |")
    assert "\n".join(rows) in (ROOT / "docs/solutions.md").read_text()


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    """The answers are a missing answer, a wrong one, one that raises, and a right one."""
    monkeypatch.setattr(answers, "accumulate", solved(dict(SOLUTIONS)["9"]).accumulate)
    monkeypatch.setattr(answers, "alpha_for", lambda scaling, r, use_rslora: None)  # no return
    assert exercises.main(["2", "10", "3", "9"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "2: not answered yet"
    assert lines[1] == (
        "10: a gradient of norm 0.5, clipped to 1, moved the weights by 1.5e-05 at rate 1, "
        "not by 0.5"
    )
    assert lines[2].startswith("3: ValueError: lora_alpha None is not a number")
    assert lines[3] == "9: passed"

    assert exercises.main(["9"]) == 0
    with pytest.raises(UserError, match="'15' is not a whole number from 1 to 14"):
        exercises.main(["15"])
