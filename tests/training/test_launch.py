"""A run with a CUDA graph takes the steps of a run without it, on a CPU with a fake graph."""

import gc
import weakref
from shlex import split
from unittest import mock

import pytest
import torch
import torch._dynamo  # imported first: later it would capture the fakes

import training.run
from benchmarks import ours
from common.device import Device
from common.errors import UserError
from model.kernels import cuda_loss, fast
from tests import runs
from tests.helpers import DEVICE, FP32_CLOSE, relative_difference
from tests.training import fake_graph
from tests.training.fake_graph import FakeGraph
from training.launch import prepare_device
from training.options import parse_options

pytestmark = pytest.mark.device
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has graphs of its own")

# There are 179 windows: micro-batches of 20, 20 and 20, and in the third step of 20, 20 and 19.
UNEVEN = split("--batch-size 60 --grad-accum 3 --max-steps 4 --lr 1e-2")
SMALL = split("--batch-size 4 --max-steps 3 --lr 1e-2")
WARM_UP = 3  # runs, the default of `make_graphed_callables`
ON_CUDA = Device(torch.device("cuda"), "bf16")
ALLOWED = 0 if DEVICE == "cpu" else FP32_CLOSE


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Compute with CUDA's loss, on a CPU with fake graphs."""
    if DEVICE != "cpu":
        return None
    memory = 20 * 320 * 8 * cuda_loss.SHARE
    monkeypatch.setattr(cuda_loss, "card_memory", lambda device: memory)
    monkeypatch.setattr(fast, "loss", cuda_loss)
    for module in (ours, training.run):
        monkeypatch.setattr(module, "prepare_device", lambda options, device: None)
    return fake_graph.install(monkeypatch)


@pytest.fixture
def make(base, book, tmp_path):
    """Return a function that makes a small run's trainer."""
    return lambda method, *options: runs.trainer(method, base, book, tmp_path, *options)


def steps_of(trainer: ours.Trainer) -> list[torch.Tensor]:
    """Take every step. Return the losses, the gradients, and the weights after each."""
    seen = []
    parameters = trainer.parameters.values()

    def note(*_):
        seen.extend(p.grad.clone() for p in parameters)

    trainer.optimizer.register_step_pre_hook(note)
    for batch in trainer.batches():
        seen += [trainer.step(batch), *(p.detach().clone() for p in parameters)]
    return seen


def assert_graph_changes_nothing(make, method: str, *options: object) -> ours.Trainer:
    """Check every step, on a CPU bit for bit, and that a graph was captured."""
    without = steps_of(make(method, *options))
    trainer = make(method, *options, "--cuda-graph")
    with_graph = steps_of(trainer)
    assert trainer.model.loss.graphed is not None
    assert len(with_graph) == len(without) > 8
    for a, b in zip(with_graph, without, strict=True):
        assert torch.equal(a, b) or relative_difference(a, b) < ALLOWED
    return trainer


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_gradients_and_weights_are_those_of_a_run_without(make, method):
    """Dropout is on: a replay draws the masks of the eager micro-batch."""
    assert_graph_changes_nothing(make, method, *UNEVEN)
    if DEVICE == "cpu":
        assert FakeGraph.replayed == 2 * (3 + 3 + 2 + 3)  # forward and backward of each


@pytest.mark.parametrize("options", ["--quantise nf4 --use-dora --riemannian", "--kernels plain"])
def test_variants_and_plain_kernels_are_captured_too(make, options):
    assert_graph_changes_nothing(make, "lora", *SMALL, *split(options))


def test_in_fp16_a_replay_takes_the_scale_that_the_scaler_has_now(make):
    def make_growing(*options):
        trainer = make(*options)
        trainer.scaler.set_growth_interval(1)
        return trainer

    trainer = assert_graph_changes_nothing(make_growing, "lora", *SMALL, "--precision", "fp16")
    assert trainer.scaler.get_scale() == 2.0 ** (16 + 3)


@on_cpu
@pytest.mark.parametrize(
    ("fails_in", "runs_before", "reason"),
    [
        ("the warm-up", 1, "CUDA out of memory"),
        ("the capture", WARM_UP, "CUDA out of memory"),
        ("the capture, by a wait", WARM_UP, "operation not permitted when stream is capturing"),
    ],
)
def test_after_a_failed_capture_nothing_stays_alive_and_the_run_goes_on(
    make, machine, monkeypatch, capsys, fails_in, runs_before, reason
):
    """The capture fails after the embedding's dropout, whose mask must be drawn again. No
    activation outlives the capture, even without a garbage collection.
    """
    alive = []
    attend = fast.causal_attention

    def failing(q, k, v, p):
        alive.append(weakref.ref(q))
        if len(alive) > 2 * runs_before:  # the model has two layers
            monkeypatch.setattr(fast, "causal_attention", attend)
            if fails_in.endswith("wait"):
                q.sum().item()
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return attend(q, k, v, p)

    without = steps_of(make("lora", *SMALL))
    monkeypatch.setattr(fast, "causal_attention", failing)
    gc.disable()
    try:
        trainer = make("lora", *SMALL, "--cuda-graph")
        with_graph = steps_of(trainer)
        assert alive and all(tensor() is None for tensor in alive)
    finally:
        gc.enable()
    assert len(with_graph) == len(without) and all(map(torch.equal, with_graph, without))
    assert f"warning: training without a CUDA graph ({reason})\n" in capsys.readouterr().err
    assert trainer.model.loss.graphed is None and FakeGraph.replayed == 0
    assert machine.stream == "default" and not machine.generator.capturing


@pytest.mark.parametrize("other", ["--data x.jsonl", "--gradient-checkpointing"])
def test_what_cannot_be_captured_is_refused(other):
    options = parse_options("-", ["lora", "--cuda-graph", *split(other)])
    with pytest.raises(UserError, match="--cuda-graph: cannot be combined"):
        prepare_device(options, ON_CUDA)


def test_a_compiler_that_fails_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no g++")))
    with pytest.raises(UserError, match=r"^--compile: needs a C\+\+ compiler.*\(no g\+\+\)$"):
        prepare_device(parse_options("-", ["lora", "--compile"]), ON_CUDA)
