"""A few cases of the campaign with damaged files (`make fault`)."""

import time
from pathlib import Path

import pytest

from tests.fault import fuzz

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


def test_a_damaged_file_is_loaded_correctly_or_refused():
    outcomes = fuzz.run(range(128), seed=int(time.time()))
    assert sum(outcome.tried for outcome in outcomes) == 128
    for outcome in outcomes:
        assert outcome.failures == [], outcome.name
