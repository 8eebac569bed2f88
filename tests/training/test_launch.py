"""A run with a CUDA graph takes the steps of a run without: on a CPU, by a graph's double."""

import gc
import signal
import weakref
from functools import partial
from shlex import split
from unittest import mock

import pytest
import torch
import torch._dynamo  # now: it would take a double of torch's for torch's own

import train
import training.run
from benchmarks import ours
from common.device import Device
from common.errors import UserError
from model.gpt2 import GPT2, GPT2Config
from model.kernels import cuda_loss, fast
from tests import runs
from tests.helpers import DEVICE, FP32_CLOSE, relative_difference
from tests.training import fake_graph
from tests.training.fake_graph import FakeGraph
from training.launch import compile_hidden, prepare_device
from training.options import parse_options

pytestmark = pytest.mark.device
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has graphs of its own")

# Two epochs of 179 windows, the last batch of which has 44.
WHOLE = ("--batch-size", 45, "--epochs", 2, "--lr", 1e-2)
# Micro-batches of 15, 15 and 14 windows in each batch, and of 3 in the last.
UNEVEN = (*WHOLE, "--grad-accum", 3, "--batch-size", 44)
GRAPH = "--cuda-graph"
ON_CUDA = Device(torch.device("cuda"), "bf16")
ALLOWED = 0 if DEVICE == "cpu" else FP32_CLOSE


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """Compute as on CUDA, by its loss; on a CPU, with a double of its graphs."""
    if DEVICE != "cpu":
        return
    memory = 20 * 320 * 8 * cuda_loss.SHARE
    monkeypatch.setattr(cuda_loss, "card_memory", lambda device: memory)
    monkeypatch.setattr(fast, "loss", cuda_loss)
    for module in (ours, training.run):
        monkeypatch.setattr(module, "prepare_device", lambda options, device: None)
    fake_graph.install(monkeypatch)


@pytest.fixture
def make(base, book, tmp_path):
    """Return a function that makes the trainer of a small run."""
    return partial(make_trainer, base, book, tmp_path)


def make_trainer(base, book, out, method: str, *options: object) -> ours.Trainer:
    return runs.trainer(method, base, book, out, *options)


def steps_of(trainer: ours.Trainer) -> dict[str, list]:
    """Take every step; return their losses and gradients, and the weights after each."""
    seen: dict[str, list] = {"losses": [], "gradients": [], "weights": []}
    zero_grad = trainer.optimizer.zero_grad

    def note(**how):
        seen["gradients"].append([p.grad.clone() for p in trainer.parameters.values()])
        zero_grad(**how)

    trainer.optimizer.zero_grad = note
    for batch in trainer.batches():
        seen["losses"].append([trainer.step(batch)])
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


@pytest.mark.parametrize("options, replays", [(WHOLE, 6), (UNEVEN, 16)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_gradients_and_weights_are_those_of_a_run_without(make, method, options, replays):
    """Dropouts are on: a replay draws what the eager micro-batch would."""
    without = steps_of(make(method, *options))
    assert FakeGraph.captured == 0
    assert_same_steps(steps_of(make(method, *options, GRAPH)), without)
    if DEVICE == "cpu":
        # a graph of the forward and one of the backward
        assert (FakeGraph.captured, FakeGraph.replayed) == (2, 2 * replays)


@pytest.mark.parametrize(
    "options", ["--use-dora", "--quantise nf4", "--riemannian", "--kernels plain"]
)
def test_variants_and_plain_kernels_are_captured_too(make, options):
    trainer = make("lora", *WHOLE, *split(options), GRAPH)
    assert_same_steps(steps_of(trainer), steps_of(make("lora", *WHOLE, *split(options))))
    assert trainer.model.loss.graphed is not None


def test_in_fp16_a_replay_takes_the_scale_that_the_scaler_has_now(make):
    def scaled_steps(*options):
        trainer = make("full", *WHOLE, "--precision", "fp16", *options)
        trainer.scaler.set_growth_interval(2)
        seen = steps_of(trainer)
        return seen, trainer.scaler.get_scale()

    without, scale = scaled_steps()
    with_graph, same_scale = scaled_steps(GRAPH)
    assert scale == same_scale != 2**16
    assert_same_steps(with_graph, without)


@on_cpu
@pytest.mark.parametrize("wait", [torch.Tensor.item, None])
def test_after_a_failed_capture_nothing_stays_alive_and_the_run_goes_on(
    make, monkeypatch, capsys, wait
):
    """It fails after the dropout in the embedding, whose mask is then drawn again. No activation
    outlives the capture, without a garbage collection.
    """
    alive = []

    def attend(q, k, v, p, attend=fast.causal_attention):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            alive.append(weakref.ref(q))
            if wait is None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
            wait(q.sum())
        return attend(q, k, v, p)

    without = steps_of(make("lora", *UNEVEN))
    monkeypatch.setattr(fast, "causal_attention", attend)
    gc.disable()
    try:
        trainer = make("lora", *UNEVEN, GRAPH)
        trainer.step(next(trainer.batches()))
        assert alive and all(tensor() is None for tensor in alive)
    finally:
        gc.enable()
    reason = "CUDA out of memory. Tried to allocate 2 GiB"
    if wait:
        reason = "operation not permitted when stream is capturing"
    assert f"warning: training without a CUDA graph ({reason})\n" in capsys.readouterr().err
    assert_same_steps(steps_of(make("lora", *UNEVEN, GRAPH)), without)
    assert (FakeGraph.captured, FakeGraph.replayed) == (0, 0)


@on_cpu
def test_a_resumed_run_captures_anew_and_ends_as_the_whole_run(base, book, tmp_path):
    options = (*UNEVEN, "--eval-every", 2)
    whole = runs.trained("lora", base, book, tmp_path / "whole", *options)
    argv = runs.arguments("lora", base, book, tmp_path / "run", *options, GRAPH)
    stop = {6: lambda moment: signal.raise_signal(signal.SIGINT)}
    assert runs.run_acting(stop, *argv).status == 130
    before = FakeGraph.captured
    assert runs.run(train.main, *argv, "--resume").status == 0
    assert FakeGraph.captured == before + 2
    resumed = runs.finished(tmp_path / "run")
    for column in ("loss", "grad_norm", "val_loss"):
        assert resumed.column(column) == whole.column(column)
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor)


@pytest.mark.parametrize("other", ["--data x.jsonl", "--gradient-checkpointing"])
def test_what_cannot_be_captured_is_refused(other):
    options = parse_options("-", ["lora", GRAPH, *split(other)])
    with pytest.raises(UserError, match=f"{GRAPH}: cannot be combined"):
        prepare_device(options, ON_CUDA)


def test_a_compiler_that_fails_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no g++")))
    with pytest.raises(UserError, match=r"^--compile: needs a C\+\+ compiler.*\(no g\+\+\)$"):
        prepare_device(parse_options("-", ["lora", "--compile"]), ON_CUDA)


def test_training_alone_is_compiled_and_its_batches_are_padded(monkeypatch):
    rows = []

    def compiled(function):
        return lambda idx: rows.append(len(idx)) or function(idx)

    monkeypatch.setattr(torch, "compile", compiled)
    model = GPT2(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2)).train()
    compile_hidden(model, rows=4)
    ids = torch.zeros(3, 8, dtype=torch.int64)
    assert len(model.hidden(ids)) == 3 and rows == [4]
    assert len(model.eval().hidden(ids)) == 3 and rows == [4]


def test_what_is_on_the_gpu_is_not_pinned():
    there = mock.Mock(is_cuda=True)
    ON_CUDA.to_device(there)
    assert not there.pin_memory.called
