"""SIGINT and SIGTERM: the first ends the step and saves, another ends at once; no traceback."""

import sys
from signal import SIGINT, SIGTERM, raise_signal

import pytest

import train
import training.session
from tests.fault.runs import Process
from tests.fault.signals import AT_ONCE, NOTICE, catches_sigterm
from tests.runs import arguments, run
from train import main
from training.checkpoint import CHECKPOINT, read_checkpoint


@pytest.mark.parametrize("numbers, status", [([SIGINT], 130), ([SIGINT, SIGTERM], 143)])
def test_a_process_in_its_steps(base, book, tmp_path, numbers, status):
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    argv = arguments("lora", base, book, out, "--epochs", 10_000)
    process = Process([sys.executable, "train.py", *argv], tmp_path)
    process.wait_until(lambda: metrics.exists() and metrics.stat().st_size)
    for number in numbers:  # the lower number is handled first
        process.send_signal(number)
    process.wait_until(lambda: "stopped after" in process.err_file.read_text())
    process.send_signal(SIGTERM)  # all is saved: it changes nothing
    assert process.wait() == status
    notice, told = process.err_file.read_text().splitlines()
    assert notice == NOTICE and not (out / "run.json").exists() and not list(out.glob(".*"))
    assert told.startswith("stopped after step" if len(numbers) == 1 else AT_ONCE)
    assert (out / CHECKPOINT).exists() == (len(numbers) == 1)


def test_a_process_that_imports_torch(base, book, tmp_path):
    argv = arguments("lora", base, book, tmp_path / "run")
    process = Process([sys.executable, "train.py", *argv], tmp_path)
    process.wait_until(lambda: catches_sigterm(process))
    process.send_signal(SIGTERM)
    assert process.wait() == 143
    assert process.err_file.read_text().splitlines() == [AT_ONCE]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module, where, step", [
    (train, "evaluate", 4), (training.session, "write_checkpoint", 6)])
def test_a_signal_in_a_validation_or_a_save_lets_it_end(
        base, book, tmp_path, monkeypatch, module, where, step):
    """It is saved once, not twice; SIGTERM comes twice, as from `timeout` through `make`."""
    real, calls = getattr(module, where), []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:  # of evaluate, the first is the base's; of saves, that of step 3
            raise_signal(SIGTERM)
            raise_signal(SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(module, where, interrupted)
    ending = run(main, *arguments("lora", base, book, tmp_path, "--max-steps", 9, "--eval-every",
                                  4, "--checkpoint-every", 3))
    assert ending.status == 143 and f"stopped after step {step}; the same command" in ending.stderr
    assert read_checkpoint(tmp_path)["progress"]["step"] == step
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    (tmp_path / CHECKPOINT).unlink()
    assert read_checkpoint(tmp_path)["progress"]["step"] == 3
