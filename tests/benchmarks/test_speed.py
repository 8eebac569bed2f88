"""The race: both sides do the same work, or no times are compared."""

import json

import pytest

from benchmarks import peft_loop, speed, speed_worker
from benchmarks.speed_worker import Task
from tests.helpers import tiny_gpt2_directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base with a context of 128 tokens."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_positions=128)[0]


def test_sides_that_do_not_train_alike_are_refused(base, monkeypatch):
    """They are measured in this process, so that the test can change a side."""

    def run_apart(task):
        return json.dumps(speed_worker.measure(Task(**json.loads(task))))

    monkeypatch.setattr(speed, "run_apart", run_apart)
    ours, theirs, *_ = speed.measure(Task(str(base), "lora", steps=1), 0)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    rate = peft_loop.learning_rate
    monkeypatch.setattr(peft_loop, "learning_rate", lambda *of: 1.1 * rate(*of))
    with pytest.raises(speed.RunError, match="the losses differ, so no time is compared"):
        speed.measure(Task(str(base), "lora", steps=1), 0)
