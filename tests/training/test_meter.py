"""Check what the training loop counts, and that counting costs a GPU nothing."""

import math

import pytest
import torch

from tests.helpers import Operations
from training import meter
from training.meter import Meter

LOSSES = [8.1, 7.9, 7.7, 7.3, 7.1, 6.9, 6.7]


def steps(fp16: bool = False, count: int = len(LOSSES)) -> Meter:
    made = Meter(fp16)
    for step, loss in enumerate(LOSSES[:count], 1):
        made.end_step(step, torch.tensor(loss), 2, torch.tensor(step / 4))
    return made


def test_a_step_launches_nothing_and_all_are_read_at_once():
    numbers = [torch.tensor(8.0) for _ in range(10)]
    with Operations() as in_steps:
        made = Meter(fp16=True)
        for step, number in enumerate(numbers, 1):
            made.end_step(step, number, 2, number)
    assert in_steps.names == []
    with Operations() as in_measure:
        made.measure()
        made.check()
    assert in_measure.names == ["stack"]


def test_the_loss_is_the_fp32_sum_that_a_device_would_make():
    total = torch.zeros(())
    for loss in LOSSES:
        total += torch.tensor(loss)
    metrics = steps().measure()
    assert metrics["loss"] == total.item() / (2 * len(LOSSES))
    assert metrics["grad_norm"] == 7 / 4


@pytest.mark.parametrize("most", [1, 3])
def test_what_waits_unread_is_bounded_and_changes_nothing(monkeypatch, most):
    whole = steps()
    monkeypatch.setattr(meter, "MOST_UNREAD", most)
    made = steps()
    assert len(made.unread) == len(LOSSES) % most < len(whole.unread)
    for name in ("loss", "grad_norm"):
        assert made.measure()[name] == whole.measure()[name]
        made, whole = steps(), steps()


def test_a_fault_does_not_outlive_a_good_restart_of_the_process():
    made = steps(count=3)
    made.end_step(4, torch.tensor(math.nan), 2, torch.tensor(1.0))
    made.end_step(5, torch.tensor(7.0), 2, torch.tensor(math.inf))
    with pytest.raises(meter.RunError, match=r"^step 4: the loss is not a finite number; "):
        made.state_dict()
    saved = steps(count=3).state_dict()
    resumed = Meter(fp16=False)
    resumed.load_state_dict(saved)
    for step, loss in enumerate(LOSSES[3:], 4):
        resumed.end_step(step, torch.tensor(loss), 2, torch.tensor(step / 4))
    assert resumed.measure()["loss"] == steps().measure()["loss"]
