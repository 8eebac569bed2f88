"""A finished run of each method, for all tests of the commands."""

import pytest

from tests.helpers import drawing
from tests.runs import Run, trained


@pytest.fixture(scope="session")
@drawing()
def runs(base, book, tmp_path_factory) -> dict[str, Run]:
    """Two epochs by each method; not to be written to."""
    out = tmp_path_factory.mktemp("runs")
    return {method: trained(method, base, book, out / method, "--epochs", 2, "--eval-every", 3,
                            "--lr", 3e-3, "--checkpoint-every", 4)
            for method in ("lora", "full")}
