"""The campaign's mutators and checks, driven by hypothesis; the campaign itself is `make fault`."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from tests.fault import fuzz
from tests.fault.targets import TARGETS, Target, prepare, problem_of
from tests.helpers import drawing


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz").resolve()
    with drawing():
        prepare(path)
    return path


@pytest.mark.parametrize("target", TARGETS[:-1], ids=lambda target: target.name)  # the last draws
@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_a_damaged_file_is_loaded_correctly_or_refused(directory, target, rng):
    path = directory / target.file
    good = path.read_bytes()
    try:
        path.write_bytes(target.mutate(rng, good))
        assert problem_of(target, directory) is None
    finally:
        path.write_bytes(good)


def test_the_campaign_sees_what_is_wrong(tmp_path):
    for check, problem in (
            (lambda directory: None, None),
            (lambda directory: 1 / 0, "ZeroDivisionError: division by zero"),
            (lambda directory: fail(f"{directory}: is damaged"), None),
            (lambda directory: fail("it is damaged"), "says 'it is damaged'"),
            (lambda directory: fail(f"{directory}: two\nlines"), "two\\nlines"),
            (lambda directory: fail(f"{directory}: " + "x" * 999), "says too much"),
            (lambda directory: bytearray(1 << 60), "MemoryError")):
        found = problem_of(Target("x", "x", lambda *_: b"", check), tmp_path)
        assert found is None if problem is None else problem in found


def fail(message: str) -> None:
    raise UserError(message)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_reader_that_dies_hangs_or_wants_memory_is_counted_and_the_rest_goes_on(monkeypatch):
    checks = (lambda directory: None, lambda directory: os._exit(7),
              lambda directory: time.sleep(60), lambda directory: bytearray(16 << 30))
    monkeypatch.setattr(fuzz, "TARGETS", tuple(
        Target(str(i), "file", lambda *_: b"bad", check) for i, check in enumerate(checks)))
    monkeypatch.setattr(fuzz, "target_of", lambda case: fuzz.TARGETS[case])
    monkeypatch.setattr(fuzz, "prepare", lambda directory: (directory / "file").write_bytes(b"x"))
    monkeypatch.setattr(fuzz, "HANG", 1)
    good, died, hung, large = fuzz.run(range(4), seed=5)
    assert (good.tried, died.tried, hung.tried, large.tried, good.failures) == (1, 1, 1, 1, [])
    assert died.failures == ["case 1 of seed 5: dies with 7"]
    assert hung.failures == ["case 2 of seed 5: hangs"]
    assert large.failures[0].startswith("case 3 of seed 5: MemoryError")
