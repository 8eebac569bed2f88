"""The estimate of a run's time: `python -m benchmarks.estimate`, the options of train.py."""

import re

import pytest

from benchmarks import estimate, ours
from tests.runs import Clock, arguments, contents, stdout_of, trained

LINE = re.compile(
    r"estimate: (.+) = (.+) for (\S+) steps of (\S+) s \+ (.+) for (\S+) validations of (\S+) s\n"
    r"peak memory so far: (\S+) MB \(cpu, fp32\)\n"
)


@pytest.fixture
def slow(monkeypatch):
    """Make a training step last 2 s and a validation 5 s. Count both."""
    clock = Clock()
    monkeypatch.setattr(estimate, "time", clock)
    calls = {"train_step": 0, "evaluate": 0}
    for owner, name, seconds in ((estimate, "train_step", 2.0), (ours.Steps, "evaluate", 5.0)):
        method = getattr(owner, name)

        def slowly(*args, name=name, seconds=seconds, method=method, **options):
            calls[name] += 1
            clock.later += seconds
            return method(*args, **options)

        monkeypatch.setattr(owner, name, slowly)
    return calls


def test_it_counts_the_steps_and_validations_of_the_run(base, book, tmp_path, slow):
    out = tmp_path / "out"
    options = ("--batch-size", 16, "--epochs", 2, "--eval-every", 3)
    real = trained("lora", base, book, out, *options)
    before = contents(out)
    said = stdout_of(estimate.main, *arguments("lora", base, book, out, *options))
    [(total, training, steps, step, validating, validations, validation, megabytes)] = LINE.findall(
        said
    )

    assert int(steps) == real.report["steps"]
    assert int(validations) == 1 + len(real.column("val_loss"))  # the base first
    assert float(step) == pytest.approx(2, rel=0.01)
    assert float(validation) == pytest.approx(5, rel=0.01)
    assert training == estimate.duration(2 * int(steps))
    assert validating == estimate.duration(5 * int(validations))
    assert total == estimate.duration(2 * int(steps) + 5 * int(validations))
    assert float(megabytes.replace(",", "")) > 50
    assert contents(out) == before  # a run in --out is left alone
    assert slow == {"train_step": 2 + 4, "evaluate": 1}  # about 8 s of steps after two others
