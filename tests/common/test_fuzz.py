"""A few cases of the campaign of damaged files (`make fault`), and what it counts as a failure."""

import os
import time
from pathlib import Path

import pytest

from common.errors import UserError
from tests.fault import fuzz
from tests.fault.targets import Target

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


def test_a_damaged_file_is_loaded_correctly_or_refused():
    outcomes = fuzz.run(range(128), seed=int(time.time()))
    assert sum(outcome.tried for outcome in outcomes) == 128
    for outcome in outcomes:
        assert outcome.failures == [], outcome.name


def refuse(message: str) -> None:
    raise UserError(message)


CHECKS = (
    (lambda directory: None, None),
    (lambda directory: refuse(f"{directory}: is damaged"), None),
    (lambda directory: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda directory: refuse("it is damaged"), "says 'it is damaged'"),
    (lambda directory: refuse(f"{directory}: two\nlines"), r"two\nlines"),
    (lambda directory: refuse(f"{directory}: " + "x" * 999), "says too much"),
    (lambda directory: bytearray(16 << 30), "MemoryError"),
    (lambda directory: os._exit(7), "dies with 7"),
    (lambda directory: time.sleep(60), "hangs"),
    (lambda directory: None, None),  # the rest goes on
)


def test_what_a_reader_must_not_do_is_counted(monkeypatch):
    targets = []
    for check, _ in CHECKS:
        targets.append(Target(str(len(targets)), "file", lambda *_: b"bad", check))
    monkeypatch.setattr(fuzz, "TARGETS", tuple(targets))
    monkeypatch.setattr(fuzz, "target_of", lambda case: fuzz.TARGETS[case])
    monkeypatch.setattr(fuzz, "prepare", lambda directory: (directory / "file").write_bytes(b"x"))
    monkeypatch.setattr(fuzz, "HANG", 1)
    outcomes = fuzz.run(range(len(CHECKS)), seed=5)
    for case, (outcome, (_, problem)) in enumerate(zip(outcomes, CHECKS, strict=True)):
        assert outcome.tried == 1 and len(outcome.failures) == (problem is not None)
        for failure in outcome.failures:
            assert failure.startswith(f"case {case} of seed 5: ") and problem in failure
