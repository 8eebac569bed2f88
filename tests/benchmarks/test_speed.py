"""The race: each side does the same work in a separate process, or no times are compared."""

import json

import pytest
import torch

from benchmarks import peft_loop, speed, speed_worker
from benchmarks.speed_worker import Task
from common.files import read_json
from tests.helpers import drawing, tiny_gpt2_directory
from tests.runs import one_line, run, table
from training.options import ROOT


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base with a context of 128 tokens."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_positions=128)[0]


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure in this process, which saves the imports and lets a test change one side."""

    def run_apart(task):
        return json.dumps(speed_worker.measure(Task(**json.loads(task))))

    monkeypatch.setattr(speed, "run_apart", run_apart)


@drawing()
@pytest.mark.usefixtures("in_this_process")
def test_the_quick_race_writes_one_result_with_the_ratios_of_its_table(base, results):
    ending = run(speed.main, "--quick", "--base", base)
    assert ending.status == 0, ending.stderr
    [path] = results.glob("quick-*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(base.parent) not in path.read_text()  # a result names no path
    stored = json.loads(path.read_text())
    assert {"base", "command", "date", "machine", "versions", "load_average"} < stored.keys()

    rows = {row[0]: row for row in table(ending.stdout)}
    for method, title in (("lora", "LoRA, fp32"), ("full", "full, fp32")):
        sides = {}
        for record in stored["measurements"]:
            if (record["method"], record["precision"]) == (method, "fp32"):
                sides[record["side"]] = record
        ours, theirs = sides["ours"], sides["theirs"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert len(set(ours["losses"])) == 3  # the compared steps train
        assert len(ours["seconds"]) == 2
        assert rows[title][2] == f"{theirs['median'] / ours['median']:.2f}"


def test_a_side_is_measured_in_a_process_of_its_own(base):
    found = json.loads(speed.run_apart(json.dumps({"base": str(base), "steps": 1})))
    assert len(found["seconds"]) == 1
    assert found["peak_mb"] > 50


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_sides_that_do_not_train_alike_are_refused(base, monkeypatch, method):
    task = Task(str(base), method, steps=1)
    assert len(speed.measure(task, 0)) >= 2  # the sides agree without the change

    rate = peft_loop.learning_rate
    monkeypatch.setattr(peft_loop, "learning_rate", lambda *of: 1.1 * rate(*of))
    with pytest.raises(speed.RunError, match="the losses differ, so no time is compared"):
        speed.measure(task, 0)


def test_dropout_is_on_in_the_timed_steps_and_off_in_the_compared_ones(base, monkeypatch):
    modes = []
    our_side = speed_worker.our_side

    def recorded(task):
        model, step = our_side(task)
        return model, lambda: modes.append(model.training) or step()

    monkeypatch.setattr(speed_worker, "our_side", recorded)
    speed_worker.measure(Task(str(base), steps=2))
    assert modes == [False] * 3 + [True] * 4  # two steps warm up


def test_the_allocator_is_set_on_all_sides_but_theirs(base, monkeypatch):
    tuned = []
    monkeypatch.setattr(speed_worker, "their_side", lambda *_: (torch.nn.Identity(), lambda: 0.0))
    for side in ("ours", "theirs", "alike"):
        monkeypatch.setattr(speed_worker, "tune_process", lambda _, side=side: tuned.append(side))
        speed_worker.measure(Task(str(base), side=side, steps=1))
    assert tuned == ["ours", "alike"]


def test_a_loss_that_is_not_a_number_is_refused():
    record = {"method": "lora", "precision": "fp32", "side": "ours", "losses": [1.0, float("nan")]}
    with pytest.raises(speed.RunError):
        speed.check_same_losses([record, record | {"side": "theirs"}])


def test_a_measurement_that_fails_ends_the_race_with_one_line(tmp_path, results):
    line = one_line(run(speed.main, "--base", tmp_path))  # a directory without a model
    assert f"a measured process ended with status 2: {tmp_path}" in line


def test_the_page_has_the_table_of_each_stored_result():
    page = (ROOT / "docs" / "speed.md").read_text()
    stored = [*speed.RESULTS.glob("speed-*.json")]
    assert stored
    for path in stored:
        for row in speed.table(read_json(path)["measurements"]):
            assert f"| {' | '.join(row)} |\n" in page
