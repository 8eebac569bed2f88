"""Check the training loop's counters."""

import math

import pytest
import torch

from tests.runs import Clock
from training import meter
from training.meter import Meter

LOSSES = [8.1, 7.9, 7.7, 7.3, 7.1, 6.9, 6.7]


def steps(fp16: bool = False, count: int = len(LOSSES)) -> Meter:
    made = Meter(fp16)
    made.seconds = 1.0
    for step, loss in enumerate(LOSSES[:count], 1):
        made.count(step, torch.tensor(loss), 2, torch.tensor(step / 4))
    return made


def test_a_fault_does_not_outlive_a_good_restart_of_the_process():
    made = steps(count=3)
    made.count(4, torch.tensor(math.nan), 2, torch.tensor(1.0))
    made.count(5, torch.tensor(7.0), 2, torch.tensor(math.inf))
    with pytest.raises(meter.RunError, match=r"^step 4: the loss is not a finite number; "):
        made.state_dict()
    saved = steps(count=3).state_dict()
    resumed = Meter(fp16=False)
    resumed.load_state_dict(saved)
    for step, loss in enumerate(LOSSES[3:], 4):
        resumed.count(step, torch.tensor(loss), 2, torch.tensor(step / 4))
    assert resumed.measure()["loss"] == steps().measure()["loss"]


def test_a_line_has_the_speed_of_its_steps_and_the_report_of_all(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    made = Meter(fp16=False)

    def wait(read=made.check):  # for the GPU
        clock.later += 6
        read()

    monkeypatch.setattr(made, "check", wait)
    speeds = []
    for step, tokens in enumerate((100, 300), 1):
        made.start()
        clock.later += 4
        made.count(step, torch.tensor(1.0), tokens, torch.tensor(1.0))
        speeds.append(made.measure()["tokens_per_second"])
    assert speeds == pytest.approx([10, 30], rel=1e-3)
    assert made.report()["tokens_per_second"] == pytest.approx(20, rel=1e-3)
