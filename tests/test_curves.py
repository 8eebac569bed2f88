"""The experiment on curves: its page, its rule, and its ten switches."""

import math
from pathlib import Path

import pytest

from lesson.experiments import curves
from lesson.experiments.common import read_results
from tests.helpers import tiny_gpt2_directory
from tests.runs import story

DOCS = Path(__file__).resolve().parents[1] / "docs"
STORED = read_results(DOCS / "figures" / "curves.json")


def test_the_page_has_the_table_of_the_stored_runs():
    assert curves.table(STORED) in (DOCS / "curves.md").read_text()


def test_a_run_is_told_if_it_is_further_off_than_any_right_run():
    """Two parts of a curve and a validation loss, with a mean of 3 and a deviation of 1."""

    def run(first, shown=math.e**3):
        return {"losses": [first] * 6 + [3.0] * 36, "shown": shown}

    right = [run(2.0, math.e**2), run(3.0), run(4.0, math.e**4)]
    for r in right:
        r["losses"][6:] = [r["losses"][0]] * 36
    other = {"losses": [3.0] * 36 + [8.0] * 6, "shown": math.e**3}
    assert curves.distance(other, right) == pytest.approx(5)
    assert curves.distance(run(3.0, math.e**0.5), right) == pytest.approx(2.5)
    assert curves.limit(right) == pytest.approx(1.5 / 0.5**0.5)  # of 2 from 3 and 4


def test_the_bench_has_the_checks_of_the_table():
    checks = "".join(path.read_text() for path in DOCS.parent.glob("*conformance*/**/*.py"))
    named = [bug.check.strip("`") for bug in curves.BUGS if bug.check.startswith("`")]
    assert [name for name in named if f"def {name}" not in checks] == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The right run, and a run with each bug, on a tiny base and text."""
    folder = tmp_path_factory.mktemp("curves")
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    base, _ = tiny_gpt2_directory(folder / "base", n_head=2, **dropouts)
    (folder / "book.txt").write_text(story(400))
    settings = {"BASE": str(base), "BOOK": folder / "book.txt", "BLOCK": 16, "STRIDE": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "SETTINGS", curves.SETTINGS | settings)
        found = {bug.name: curves.trained(bug, 0, short=False) for bug in curves.BUGS}
        return {"right": curves.trained(None, 0, short=False), **found}


def test_each_switch_changes_the_run(runs):
    right = runs.pop("right")
    merged = runs.pop("merged twice")
    assert merged["losses"] == right["losses"]
    assert merged["used"] != right["used"]
    for name, run in runs.items():
        assert run["losses"] != right["losses"], name
    at_once = {name for name, run in runs.items() if run["losses"][0] != right["losses"][0]}
    assert at_once == {"A and B random", "targets shifted twice", "a mean of means"}
    assert len({tuple(run["losses"]) for run in runs.values()}) == len(runs)
    assert runs["alpha forgotten"]["used"] != runs["alpha forgotten"]["shown"]
