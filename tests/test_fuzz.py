"""The campaign's mutators and checks, driven by hypothesis; the campaign itself is `make fault`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from tests.fault import fuzz
from tests.fault.targets import MARKER, TARGETS, prepare, problem_of


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz").resolve()
    prepare(path)
    return path


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def target(request, directory) -> Iterator:
    path = directory / request.param.file
    good = path.read_bytes()
    yield request.param
    path.write_bytes(good)


def test_a_good_file_is_loaded(directory, target):
    target.check(directory)


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_a_damaged_file_is_loaded_correctly_or_refused(directory, target, rng):
    path = directory / target.file
    good = path.read_bytes()
    try:
        path.write_bytes(target.mutate(rng, good, directory / MARKER))
        assert problem_of(target, directory) is None
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("check, problem", [
    (lambda directory: None, None),
    (lambda directory: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda directory: fail(f"{directory}: is damaged"), None),
    (lambda directory: fail("it is damaged"), "says 'it is damaged'"),
    (lambda directory: fail(f"{directory}: two\nlines"), "two\\nlines"),
    (lambda directory: fail(f"{directory}: " + "x" * 999), "says too much"),
    (lambda directory: (directory / MARKER).touch(), "ran the file's code"),
    (lambda directory: bytearray(1 << 60), "MemoryError"),
])
def test_the_campaign_sees_what_is_wrong(tmp_path, check, problem):
    target = fuzz.Target("x", "x", lambda *_: b"", check)
    found = problem_of(target, tmp_path)
    assert found is None if problem is None else problem in found


def fail(message: str) -> None:
    raise UserError(message)


def die(directory: Path) -> None:
    os._exit(7)


def spin(directory: Path) -> None:
    while True:
        pass


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_reader_that_dies_hangs_or_wants_memory_is_counted_and_the_rest_goes_on(monkeypatch):
    checks = (lambda directory: None, die, spin, lambda directory: bytearray(2 << 30))
    monkeypatch.setattr(fuzz, "TARGETS", tuple(
        fuzz.Target(str(i), "file", lambda *_: b"bad", check) for i, check in enumerate(checks)))
    monkeypatch.setattr(fuzz, "target_of", lambda case: fuzz.TARGETS[case])
    monkeypatch.setattr(fuzz, "prepare", lambda directory: (directory / "file").write_bytes(b"x"))
    monkeypatch.setattr(fuzz, "HANG", 3)
    good, died, hung, large = fuzz.run(range(4), seed=5)
    assert [outcome.tried for outcome in (good, died, hung, large)] == [1] * 4
    assert good.failures == []
    assert died.failures == ["case 1 of seed 5: dies with 7"]
    assert hung.failures == ["case 2 of seed 5: hangs"]
    assert large.failures[0].startswith("case 3 of seed 5: MemoryError")
