"""A small base on disk and a good adapter of it."""

import pytest

from lora.adapter import save_adapter
from tests.adapters import adapted
from tests.helpers import tiny_gpt2_directory


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The directory of `helpers.tiny_gpt2()`; not to be written to."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"))[0]


@pytest.fixture
def adapter(base, tmp_path):
    """The directory of an adapter of `base` on c_attn, r 4, as we write it."""
    save_adapter(*adapted(base, ("c_attn",), r=4), tmp_path / "adapter", "gpt2")
    return tmp_path / "adapter"
