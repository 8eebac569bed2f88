"""Make an adapter, and serve its page."""

import pytest


@pytest.fixture(scope="module")
def every_layer(base, tmp_path_factory):
    """An adapter of all linear layers of `base`, r 3, alpha 2."""
    from lora.save import save_adapter
    from tests.pairs import ALL_FOUR, adapted

    directory = tmp_path_factory.mktemp("explore") / "adapter"
    save_adapter(adapted(base, ALL_FOUR, r=3, lora_alpha=2), directory, "gpt2")
    return directory


@pytest.fixture(scope="module")
def client(base, every_layer):
    """Return a `Client` of that adapter's page."""
    from tests.explore.client import serving

    with serving(base, every_layer) as client:
        yield client
