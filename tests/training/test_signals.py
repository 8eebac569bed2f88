"""A first signal lets the step end and saves. A second signal ends the run at once."""

import os
import sys
from shlex import split
from signal import SIGINT, SIGTERM, raise_signal

import pytest

import train
import training.run
import training.saver
from common.processes import Processes
from tests.fault.runs import Process
from tests.fault.signals import AT_ONCE, NOTICE
from tests.runs import arguments, run, run_acting
from train import main
from training.checkpoint import CHECKPOINT, read_checkpoint


def test_a_process_in_its_steps(base, book, tmp_path):
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    argv = arguments("lora", base, book, out, "--epochs", 10_000)
    process = Process([sys.executable, "train.py", *argv], tmp_path)
    process.wait_until(lambda: metrics.exists() and metrics.stat().st_size)
    process.send_signal(SIGINT)
    process.wait_until(lambda: "stopped after" in process.err_file.read_text())
    process.send_signal(SIGTERM)  # everything is saved, so this changes nothing
    status, (notice, told) = process.end()
    assert status == 130 and notice == NOTICE and told.startswith("stopped after step")
    assert (out / CHECKPOINT).exists()
    assert not (out / "run.json").exists() and not list(out.glob(".*"))


@pytest.mark.parametrize("second, status", [(SIGINT, 130), (SIGTERM, 143)])
def test_another_signal_ends_at_once(base, book, tmp_path, monkeypatch, capfd, second, status):
    def twice(trainer):
        raise_signal(SIGINT)
        raise_signal(second)

    monkeypatch.setattr(os, "_exit", sys.exit)
    ending = run_acting({3: twice}, *arguments("lora", base, book, tmp_path))
    assert ending.status == status
    assert capfd.readouterr().err.splitlines() == [NOTICE, AT_ONCE]
    assert read_checkpoint(tmp_path)["progress"]["step"] == 0
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_a_signal_after_the_last_save_ends_at_once(base, book, tmp_path, monkeypatch):
    """After the last save, the run no longer checks for a request to stop."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(training.run, "write_report", lambda *_: raise_signal(SIGTERM))
    ending = run(main, *arguments("lora", base, book, tmp_path, "--max-steps", 2))
    assert ending.status == 143
    assert read_checkpoint(tmp_path)["progress"]["step"] == 2


@pytest.mark.parametrize(
    "module, where, step, before",
    [(train, "evaluate", 4, 3), (training.saver, "write_checkpoint", 4, 3)],
)
def test_a_signal_in_a_validation_or_a_save_lets_it_end(
    base, book, tmp_path, monkeypatch, module, where, step, before
):
    """The run saves once, though SIGTERM comes twice, as from `timeout` through `make`."""
    real = getattr(module, where)
    calls = []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:  # the first evaluation is of the base, the first save is before step 1
            raise_signal(SIGTERM)
            raise_signal(SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(module, where, interrupted)
    options = split("--max-steps 9 --eval-every 4 --checkpoint-every 3")
    ending = run(main, *arguments("lora", base, book, tmp_path, *options))
    assert ending.status == 143 and f"stopped after step {step}; the same command" in ending.stderr
    assert read_checkpoint(tmp_path)["progress"]["step"] == step
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    (tmp_path / CHECKPOINT).unlink()
    assert read_checkpoint(tmp_path)["progress"]["step"] == before


def test_a_signal_while_a_step_ends_is_left_to_the_next_step(base, book, tmp_path, monkeypatch):
    """The signal comes after the step's check. It must not end the run unsaved."""

    maximum = Processes.maximum

    def late(self, *values):
        """Send a signal right after the processes have exchanged their signals."""
        found = maximum(self, *values)
        metrics = tmp_path / "metrics.jsonl"
        if not sent and metrics.exists() and metrics.read_text().count("\n") == 3:
            sent.append(True)
            raise_signal(SIGTERM)
        return found

    sent: list[bool] = []
    monkeypatch.setattr(Processes, "maximum", late)
    ending = run(main, *arguments("lora", base, book, tmp_path, "--max-steps", 9))
    assert sent and ending.status == 143
    assert "stopped after step 4; the same command" in ending.stderr
    assert read_checkpoint(tmp_path)["progress"]["step"] == 4
