"""A run with a CUDA graph takes the steps of a run without: on a CPU, by a graph's double."""

import io
import signal
from contextlib import redirect_stderr
from functools import partial
from unittest import mock

import pytest
import torch
import torch._dynamo  # now: it would take a double of torch's for torch's own

import train
from common.device import Device
from model.kernels import cuda_loss, fast, loss
from tests import runs
from tests.helpers import DEVICE, FP32_CLOSE, relative_difference
from tests.ranks import fork
from tests.training import fake_graph
from tests.training.fake_graph import FakeGraph
from training import graph as cuda_graph
from training.graph import can_capture
from training.options import parse_options

pytestmark = pytest.mark.device
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has graphs of its own")

# Two epochs of 179 windows, the last batch of which has 44.
WHOLE = ("--batch-size", 45, "--epochs", 2, "--lr", 1e-2)
# Parts of 15 windows, also in the last batch: 15, 15 and 14.
PARTS = (*WHOLE, "--grad-accum", 3)
# Parts of 15, 15 and 14 windows in each batch, 1, 1 and 1 in the last.
UNEVEN = (*PARTS, "--batch-size", 44)
ALLOWED = 0 if DEVICE == "cpu" else FP32_CLOSE
ON_CUDA = Device(torch.device("cuda"), "bf16")


@pytest.fixture(autouse=True)
def generator(monkeypatch):
    """Compute as on CUDA, by its loss; on a CPU, with a double of its graphs."""
    if DEVICE != "cpu":
        return None
    memory = 20 * 320 * 8 * cuda_loss.SHARE
    monkeypatch.setattr(cuda_loss, "card_memory", lambda device: memory)
    monkeypatch.setattr(loss, "_TiedCrossEntropy", cuda_loss.TiedCrossEntropy)
    on_cuda = partial(can_capture, device=ON_CUDA)
    monkeypatch.setattr(train, "can_capture", lambda options, device: on_cuda(options))
    return fake_graph.install(monkeypatch)


@pytest.fixture
def make(base, book, tmp_path):
    """Return a function that makes the trainer of a small run."""

    def make_trainer(method: str, *options: object, fast: bool = True) -> train.Trainer:
        return runs.trainer(method, base, book, tmp_path, *options, fast=fast)

    return make_trainer


def steps_of(trainer: train.Trainer, skip: int = 0) -> dict[str, list]:
    """Take every step; return their losses and gradients, and the weights after each."""
    seen: dict[str, list] = {"losses": [], "gradients": [], "weights": []}
    zero_grad = trainer.optimizer.zero_grad

    def note(**how):
        seen["gradients"].append([p.grad.clone() for p in trainer.parameters.values()])
        zero_grad(**how)

    trainer.optimizer.zero_grad = note
    for batch in trainer.batches(skip):
        trainer.step(batch)
        seen["losses"].append([torch.tensor(trainer.measure()["loss"])])
        seen["weights"].append([p.detach().clone() for p in trainer.parameters.values()])
    return seen


def assert_same_steps(one: dict[str, list], other: dict[str, list]) -> None:
    """Check them, on a CPU to the bit."""
    for kind in one:
        assert len(one[kind]) == len(other[kind])
        for step, (mine, theirs) in enumerate(zip(one[kind], other[kind], strict=True), 1):
            for a, b in zip(mine, theirs, strict=True):
                same = torch.equal(a, b) or relative_difference(a, b) < ALLOWED
                assert same, f"{kind} of step {step}"


@pytest.mark.parametrize("parts, replays", [(WHOLE, 6), (PARTS, 18), (UNEVEN, 16)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_gradients_and_weights_are_those_of_a_run_without(
    make, method, precision, parts, replays
):
    """Dropouts are on: a replay draws what the eager part would."""
    options = (*parts, "--precision", precision)
    without = steps_of(make(method, *options, "--no-cuda-graph"))
    assert FakeGraph.captured == 0
    assert_same_steps(steps_of(make(method, *options)), without)
    if DEVICE == "cpu":
        assert (FakeGraph.captured, FakeGraph.replayed) == (1, replays)


def test_a_plain_model_is_captured_too(make):
    without = steps_of(make("lora", *WHOLE, "--no-cuda-graph", fast=False))
    assert_same_steps(steps_of(make("lora", *WHOLE, fast=False)), without)


@pytest.mark.parametrize("options", [("--use-dora",), ("--quantise", "nf4"), ("--riemannian",)])
def test_variants_are_captured_too(make, options):
    trainer = make("lora", *WHOLE, *options)
    assert_same_steps(
        steps_of(trainer), steps_of(make("lora", *WHOLE, *options, "--no-cuda-graph"))
    )
    assert trainer.backward_of_part.graph is not None


def test_in_fp16_a_replay_takes_the_scale_that_the_scaler_has_now(make):
    def scaled_steps(*options):
        trainer = make("full", *WHOLE, "--precision", "fp16", *options)
        trainer.scaler.set_growth_interval(2)
        seen = steps_of(trainer)
        return seen, trainer.scaler.get_scale()

    without, scale = scaled_steps("--no-cuda-graph")
    with_graph, same_scale = scaled_steps()
    assert scale == same_scale != 2**16
    assert_same_steps(with_graph, without)


@on_cpu
def test_a_compiled_model_is_compiled_once_and_captured_once(make, monkeypatch):
    """An odd part is filled up to the shape of the others."""
    compiled = []
    ran = []

    def count(graph, inputs):
        def run(*arguments):
            ran.append(graph)
            return graph.forward(*arguments)

        compiled.append(graph)
        return run

    options = ("lora", *WHOLE, *runs.NO_DROPOUT["lora"])
    without = steps_of(make(*options, "--no-cuda-graph"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch.compiler.reset()
    seen = steps_of(make(*options, "--compile"))
    assert (len(compiled), FakeGraph.captured, FakeGraph.replayed) == (1, 1, 6)
    # To warm up, in the capture, and for odd parts; torch 2.8 compiles nothing in the double's.
    assert 0 <= cuda_graph.WARM_UP + 1 + 2 - len(ran) <= 1
    for mine, theirs in zip(seen["losses"], without["losses"], strict=True):
        assert relative_difference(mine[0], theirs[0]) < 1e-5


def fails_to_capture(make, *options: object) -> str:
    """Check that the run goes on as if it had not tried; return what it says."""
    said = io.StringIO()
    with redirect_stderr(said):
        seen = steps_of(make("lora", *PARTS, *options))
    assert FakeGraph.replayed == 0
    assert_same_steps(seen, steps_of(make("lora", *PARTS, *options, "--no-cuda-graph")))
    return said.getvalue()


@on_cpu
@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.nonzero])
def test_a_part_that_waits_for_the_gpu_is_not_captured_and_the_run_goes_on(make, generator, wait):
    """It fails after the dropout in the embedding, whose mask is then drawn again."""

    def attend(q, k, v, p, attend=fast.causal_attention):
        wait(q.sum())
        return attend(q, k, v, p)

    with mock.patch.object(fast, "causal_attention", attend):
        said = fails_to_capture(make)
    reason = "operation not permitted when stream is capturing"
    assert said == f"warning: training without a CUDA graph ({reason})\n"
    assert FakeGraph.captured == 0
    assert not generator.captured
    assert generator.open_pools == []


@on_cpu
def test_a_capture_that_is_out_of_memory_is_given_up(make, monkeypatch):
    def capture(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    said = fails_to_capture(make)
    assert said == (
        "warning: training without a CUDA graph (CUDA out of memory. Tried to allocate 2 GiB)\n"
    )


@on_cpu
def test_without_room_for_an_odd_part_beside_it_there_is_no_graph(make, monkeypatch):
    fake_graph.install(monkeypatch, free=20e9, largest=6e9)  # of 80: an eighth stays free
    assert "memory is too small" in fails_to_capture(make)
    assert FakeGraph.captured == 0
    fake_graph.install(monkeypatch, free=20e9, largest=4e9)
    steps_of(make("lora", *PARTS))
    assert FakeGraph.captured == 1


@on_cpu
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_captures_anew_and_ends_as_the_whole_run(base, book, tmp_path, method):
    options = (*PARTS, "--eval-every", 2)
    whole = runs.trained(method, base, book, tmp_path / "whole", *options)
    without = runs.trained(method, base, book, tmp_path / "eager", *options, "--no-cuda-graph")
    argv = runs.arguments(method, base, book, tmp_path / "run", *options)
    stop = {6: lambda trainer: signal.raise_signal(signal.SIGINT)}
    assert runs.run_acting(stop, *argv).status == 130
    before = FakeGraph.captured
    assert runs.run(train.main, *argv, "--resume").status == 0
    assert FakeGraph.captured == before + 1

    resumed = runs.finished(tmp_path / "run")
    for run in (resumed, without):
        for column in ("loss", "grad_norm", "val_loss"):
            assert run.column(column) == whole.column(column)
        for name, tensor in whole.weights.items():
            assert torch.equal(run.weights[name], tensor)


@on_cpu
def test_ranks_of_equal_shares_take_the_steps_of_ranks_without(base, book, tmp_path):
    options = ("--batch-size", 44, "--grad-accum", 2, "--max-steps", 6, "--lr", 1e-2)
    found = []
    for more in ((), ("--no-cuda-graph",)):
        out = tmp_path / f"ranks {len(more)}"
        argv = runs.arguments("lora", base, book, out, *options, *more)
        statuses, lines = fork(tmp_path / f"said {len(more)}", argv, argv)
        assert statuses == [0, 0], lines
        found.append(runs.finished(out))
    with_graph, without = found
    assert with_graph.column("loss") == without.column("loss")
    assert with_graph.column("grad_norm") == without.column("grad_norm")


@pytest.mark.parametrize(
    "options, device, captured",
    [
        ((), "cuda", True),
        (("--compile", "--grad-accum", 2), "cuda", True),
        (("--no-cuda-graph",), "cuda", False),
        (("--gradient-checkpointing",), "cuda", False),
        (("--data", "a.jsonl"), "cuda", False),
        ((), "cpu", False),
        ((), "mps", False),
    ],
)
def test_a_graph_is_captured_on_cuda_where_all_parts_are_alike(options, device, captured):
    asked = parse_options("-", ["lora", *map(str, options)])
    assert can_capture(asked, Device(torch.device(device), "bf16")) == captured


def test_what_is_on_the_gpu_is_not_pinned():
    there = mock.Mock(is_cuda=True)
    ON_CUDA.copy(there)
    assert not there.pin_memory.called
