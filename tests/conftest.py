"""Make a small base on disk, an adapter for it, a book, and a finished run of each method.

Fixtures import their modules late: pytest-xdist imports this file before it starts its workers.
"""

import os
import signal
from shlex import split

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from threads
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # skips compiling CPU test programs

import pytest

# `nohup` and background jobs of a shell ignore these signals, which the tests need.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda", "mps"),
        help="cuda or mps: run only the tests marked `device`, and compute there",
    )


def pytest_configure(config):
    """Set the tests' device, `helpers.DEVICE`, before any test is imported."""
    device = config.getoption("--device")
    os.environ["TEST_DEVICE"] = device
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot fork
        return
    import torch

    present = {"cuda": torch.cuda, "mps": torch.backends.mps}
    if not present[device].is_available():
        raise pytest.UsageError(f"--device {device}: torch finds none on this machine")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # needed by deterministic matmuls
    torch.use_deterministic_algorithms(True)  # resumed runs are compared byte by byte


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        return
    others = [item for item in items if not item.get_closest_marker("device")]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item.get_closest_marker("device")]


@pytest.fixture(scope="session", autouse=True)
def _no_pictures():
    """Draw no picture unless a test asks for it (`helpers.drawing`): each takes half a second."""
    from tests.helpers import drawing

    with drawing(lambda: False):
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return the directory of `helpers.tiny_gpt2()`. Do not write to it."""
    from tests.helpers import tiny_gpt2_directory

    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"))[0]


@pytest.fixture
def adapter(base, tmp_path):
    """Return the directory of an adapter of `base` on c_attn, r 4, written by this project."""
    from lora.save import save_adapter
    from tests.pairs import adapted

    save_adapter(adapted(base, ("c_attn",), r=4), tmp_path / "adapter", "gpt2")
    return tmp_path / "adapter"


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """Return `runs.story()` as a file. Do not write to it."""
    from tests.runs import story

    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(story())
    return path


@pytest.fixture(scope="session")
def runs(base, book, tmp_path_factory):
    """Train two epochs by each method, with pictures. Return both `runs.Run`, to read only."""
    from tests.helpers import drawing
    from tests.runs import trained

    out = tmp_path_factory.mktemp("runs")
    options = split("--epochs 2 --eval-every 3 --lr 3e-3 --checkpoint-every 4")
    with drawing():
        return {
            method: trained(method, base, book, out / method, *options)
            for method in ("lora", "full")
        }


@pytest.fixture
def process_group():
    """A group of this process alone, as `torchrun` with one process makes."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
