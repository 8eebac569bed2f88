"""The experiment on curves: its page, its rule, and its ten switches."""

from pathlib import Path

from lesson.experiments import curves
from lesson.experiments.common import read_results

DOCS = Path(__file__).resolve().parents[1] / "docs"
STORED = read_results(DOCS / "figures" / "curves.json")


def test_the_page_has_the_table_of_the_stored_runs():
    assert curves.table(STORED) in (DOCS / "curves.md").read_text()


def test_the_bench_has_the_checks_of_the_table():
    checks = "".join(path.read_text() for path in DOCS.parent.glob("*conformance*/**/*.py"))
    named = [bug.check.strip("`") for bug in curves.BUGS if bug.check.startswith("`")]
    assert [name for name in named if f"def {name}" not in checks] == []
