"""The race: both sides do the same work, or no times are compared."""

import json

import pytest

from benchmarks import peft_loop, speed, speed_worker
from benchmarks.speed_worker import Task
from tests.helpers import tiny_gpt2_directory
from tests.runs import run, table


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base with a context of 128 tokens."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_positions=128)[0]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The directory of the results. Measure in this process, so that a test can change a side."""

    def run_apart(task):
        return json.dumps(speed_worker.measure(Task(**json.loads(task))))

    monkeypatch.setattr(speed, "run_apart", run_apart)
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    return tmp_path


def test_the_quick_race_stores_the_times_of_its_table(base, results):
    ending = run(speed.main, "--quick", "--base", base)
    assert ending.status == 0, ending.stderr
    [path] = results.glob("quick-*.json")
    assert str(base.parent) not in path.read_text()  # a result names no path
    rows = {row[0]: row for row in table(ending.stdout)}
    for method, title in (("lora", "LoRA, fp32"), ("full", "full, fp32")):
        sides = {}
        for record in json.loads(path.read_text())["measurements"]:
            if (record["method"], record["precision"]) == (method, "fp32"):
                sides[record["side"]] = record
        ours, theirs = sides["ours"], sides["theirs"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert len(set(ours["losses"])) == 3  # the compared steps train
        assert rows[title][2] == f"{theirs['median'] / ours['median']:.2f}"


def test_sides_that_do_not_train_alike_are_refused(base, results, monkeypatch):
    rate = peft_loop.learning_rate
    monkeypatch.setattr(peft_loop, "learning_rate", lambda *of: 1.1 * rate(*of))
    with pytest.raises(speed.RunError, match="the losses differ, so no time is compared"):
        speed.measure(Task(str(base), "lora", steps=1), 0)
