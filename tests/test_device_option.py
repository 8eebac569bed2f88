"""Check the option that runs the tests on a GPU."""

from unittest import mock

import pytest
import torch

from tests import conftest


def config(device: str) -> mock.Mock:
    return mock.Mock(getoption=lambda name: device)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv("TEST_DEVICE", "cpu")


def test_a_device_that_is_not_there_is_one_clear_line():
    assert not torch.backends.mps.is_available() or not torch.cuda.is_available()
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(pytest.UsageError, match=f"^--device {missing}: torch finds none[^\n]*$"):
        conftest.pytest_configure(config(missing))


def test_on_a_device_only_the_tests_that_compute_there_run():
    marked = mock.Mock(get_closest_marker=lambda name: name == "device")
    other = mock.Mock(get_closest_marker=lambda name: None)
    for device, kept in (("cpu", [marked, other]), ("cuda", [marked])):
        items = [marked, other]
        conftest.pytest_collection_modifyitems(config(device), items)
        assert items == kept
