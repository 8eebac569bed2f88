"""SIGINT and SIGTERM: the first ends the step and saves, the second ends at once; no traceback."""

import signal

import pytest

import train
import training.state
from tests.fault.process import start, train_command
from tests.fault.signals import AT_ONCE, NOTICE, catches_sigterm
from tests.runs import arguments, run
from train import main
from training.checkpoint import read_checkpoint


@pytest.mark.parametrize("numbers, status", [
    ([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGTERM], 143)])
def test_a_process_in_its_steps(base, book, tmp_path, numbers, status):
    out = tmp_path / "run"
    process = start(train_command(*arguments("lora", base, book, out, "--epochs", 10_000)),
                    tmp_path)
    metrics = out / "metrics.jsonl"
    process.wait_until(lambda: metrics.exists() and metrics.stat().st_size)
    for number in numbers:  # the lower number is handled first
        process.popen.send_signal(number)
    assert process.wait() == status
    notice, told = process.error_lines()
    assert notice == NOTICE and not (out / "run.json").exists()
    if len(numbers) == 1:
        assert told.startswith("stopped after step") and (out / "checkpoint.pt").exists()
    else:
        assert told == AT_ONCE
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_imports_torch(base, book, tmp_path, number, status):
    out = tmp_path / "run"
    process = start(train_command(*arguments("lora", base, book, out)), tmp_path)
    process.wait_until(lambda: catches_sigterm(process))
    process.popen.send_signal(number)
    assert process.wait() == status
    assert process.error_lines() == [AT_ONCE] and not out.exists()


@pytest.mark.parametrize("module, where, step", [
    (train, "evaluate", 4), (training.state, "write_checkpoint", 6)])
def test_a_signal_in_a_validation_or_a_save_lets_it_end(
        base, book, tmp_path, monkeypatch, module, where, step):
    """It is saved once, not twice."""
    real, calls = getattr(module, where), []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:  # of evaluate, the first is the base's; of saves, that of step 3
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(module, where, interrupted)
    ending = run(main, *arguments("lora", base, book, tmp_path, "--max-steps", 9, "--eval-every",
                                  4, "--checkpoint-every", 3))
    assert ending.status == 143 and f"stopped after step {step}; go on with" in ending.stderr
    assert read_checkpoint(tmp_path)[0]["progress"]["step"] == step
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    (tmp_path / "checkpoint.pt").unlink()
    assert read_checkpoint(tmp_path)[0]["progress"]["step"] == 3
