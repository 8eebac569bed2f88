"""The GPU report: its checks pass on a CPU, and every seeded fault fails a check."""

import json
import math
from argparse import Namespace
from contextlib import nullcontext
from functools import cache, partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from benchmarks import gpu_checks, gpu_speed, verify_gpu
from benchmarks.gpu_checks import GRAPH, Steps, all_checks, compare
from benchmarks.parity_report import Report
from common.device import Device
from common.errors import RunError
from data.windows import Batch
from lora.layer import LoRALinear
from model import gpt2
from model.kernels import fast
from tests.runs import one_line, run
from training import variants
from training.optimizer import AdamW
from training.ranks import Ranks
from training.run import Run

ON_CUDA = Device(torch.device("cuda"), "fp32")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    made = verify_gpu.parse_args(["--dry-run"])
    gpu_checks.make_inputs(made, tmp_path_factory.mktemp("verify"))
    steps_of_peft = cache(partial(gpu_checks.steps_of_peft, made))
    with pytest.MonkeyPatch.context() as patch:  # the faults do not change these
        patch.setattr(gpu_checks, "steps_of_peft", lambda opts, command: steps_of_peft(command))
        yield made


@pytest.fixture
def opts(inputs):
    inputs.known.clear()  # forget the steps of another fault
    return inputs


def eighth(patch):
    def all_reduce(ranks, model, loss):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 8

    patch.setattr(Ranks, "all_reduce_gradients", all_reduce)


def first_batch(patch):
    def batches(self, training, first=0):
        for _ in range(self.total_steps):
            yield next(real(self, training))

    real = Run.batches
    patch.setattr(Run, "batches", batches)


def one_nat(patch):
    def scores(tokens, scored_bytes, loss, accuracy):
        return real(tokens, scored_bytes, loss + 1, accuracy)

    real = evaluate.Scores
    patch.setattr(evaluate, "Scores", scores)


def reseed(patch):
    def step(*given):
        torch.manual_seed(0)
        return real(*given)

    real = train.train_step
    patch.setattr(train, "train_step", step)


def no_scaling(patch):
    patch.setattr(LoRALinear, "update", lambda self, x, y: self.lora_B(self.lora_A(x)))


def next_token_shown(patch):
    def attend(q, k, v, p):
        length = q.size(-2)
        mask = torch.ones(length, length, dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    patch.setattr(fast, "causal_attention", attend)


def moments_lost(patch):
    patch.setattr(AdamW, "load_state_dict", lambda *_: None)


def micro_batch_mean(patch):
    real = Batch.micro_batches

    def micro_batches(self):
        for inputs, targets in real(self):
            object.__setattr__(self, "num_tokens", targets.numel())
            yield inputs, targets

    patch.setattr(Batch, "micro_batches", micro_batches)


def dropout_in_evaluation(patch):
    real = fast.dropout
    patch.setattr(fast, "dropout", lambda x, p, training: real(x, p, True))


def no_schedule(patch):
    patch.setattr(train, "learning_rate", lambda step, total, peak, warmup: peak)


def option_ignored(patch):
    patch.setattr(variants, "precondition", lambda model: None)


def last_token_of_the_vocabulary_lost(patch):
    real = fast.loss.tied_cross_entropy
    short = SimpleNamespace(
        tied_cross_entropy=lambda h, w, y: real(h, w[:-1], y), token_losses=fast.loss.token_losses
    )
    patch.setattr(fast, "loss", short)


def last_micro_batch_lost(patch):
    def micro_batches(self):
        return islice(real(self), len(self.indices) // self.micro_batch_size)

    real = Batch.micro_batches
    patch.setattr(Batch, "micro_batches", micro_batches)


def recomputed_with_other_masks(patch):
    patch.setattr(gpt2, "checkpoint", partial(gpt2.checkpoint, preserve_rng_state=False))


def clipped_before_unscaling(patch):
    patch.setattr(torch.amp.GradScaler, "unscale_", lambda *_: None)


def trained_in_low_precision(patch):
    def set_up(run, model):
        real(run, model)
        model.to(run.device.dtype)

    real = Run.set_up_model
    patch.setattr(Run, "set_up_model", set_up)


def precision_ignored(patch):
    patch.setattr(Device, "autocast", lambda *_: nullcontext())


FAULTS = {
    eighth: "lora, beside PEFT",
    first_batch: "lora, beside PEFT",
    one_nat: "lora, beside PEFT",
    reseed: "dropout",
    no_scaling: "lora, beside PEFT",
    next_token_shown: "full --precision fp32",
    moments_lost: "--resume",
    micro_batch_mean: "lora --precision fp32 --grad-accum 3",
    dropout_in_evaluation: "dropout",
    no_schedule: "lora, beside PEFT",
    option_ignored: "lora --riemannian --precision fp32",
    last_token_of_the_vocabulary_lost: "full --precision fp32",
    last_micro_batch_lost: "lora --precision fp32 --grad-accum 3",
    recomputed_with_other_masks: "dropout",
    clipped_before_unscaling: "lora --clip 0.1 --precision fp16",
    trained_in_low_precision: "full --precision bf16",
    precision_ignored: "full --precision bf16",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_fails_the_dry_run(opts, monkeypatch, fault):
    fault(monkeypatch)
    figures = all_checks(opts)[FAULTS[fault]]().values()
    assert any(not figure <= limit for figure, limit in figures)


def test_a_dry_run_passes_and_writes_one_report(opts, tmp_path, monkeypatch):
    """Only the checks of the faults run. `make verify-gpu ARGS=--dry-run` runs all checks."""
    few = {*FAULTS.values(), "two ranks"}
    every = gpu_checks.all_checks

    def some(opts):
        return {name: check for name, check in every(opts).items() if name in few}

    monkeypatch.setattr(gpu_checks, "all_checks", some)
    ending = run(verify_gpu.main, "--dry-run", "--out", tmp_path)
    assert ending.status == 0, ending
    assert ending.stdout.endswith("leave it off, because no check has run it here\n")
    report = json.loads((tmp_path / "gpu-report.json").read_text())
    parts = {part["name"]: part for part in report["parts"]}
    assert list(parts) == list(verify_gpu.PARTS)
    assert {part["result"] for part in parts.values()} == {"ok"}
    names = [check["name"] for check in parts["checks"]["checks"]]
    assert {name.split(": ")[0] for name in names} == few
    rows = parts["speed"]["facts"]
    assert rows["this project, LoRA, bf16"]["time / ours"] == 1
    assert rows["PEFT, LoRA, bf16 autocast"]["ms a step"] > 0

    text = (tmp_path / "gpu-report.md").read_text()
    assert text.startswith("# GPU report: dry run on a CPU")
    assert [part for part in parts if f"\n## {part}\n" in text] == list(parts)
    assert str(tmp_path) not in text


def test_on_cuda_every_way_and_variant_is_checked(opts):
    cuda = Namespace(device=ON_CUDA, low="fp16")
    found = " ".join(gpu_checks.commands(cuda)).split()
    every = "--cuda-graph --compile --allow-tf32 --gradient-checkpointing --grad-accum --use-dora"
    assert {*every.split(), "--quantise", "--riemannian", "--freeze-a", "--data"} <= set(found)
    low = [command for command in gpu_checks.commands(cuda) if "fp16" in command]
    assert not any("lora_ga" in command for command in low)
    assert not any(GRAPH in command for command in gpu_checks.commands(opts))


def test_what_is_not_a_number_and_a_capture_that_failed_fail(opts, monkeypatch):
    nan = Steps([math.nan], [{"a": torch.full((2,), math.nan)}], {"a": torch.ones(2)}, math.nan)
    good = Steps([1.0], [{"a": torch.ones(2)}], {"a": torch.ones(2)}, 1.0)
    limits = gpu_checks.LIMITS["bf16"]
    found = compare("lora", nan, good, limits)
    assert sum(not figure <= limit for figure, limit in found.values()) == 4
    monkeypatch.setattr(gpu_checks, "take_steps", lambda *_: good)
    made = Namespace(known={})
    for command, failures in (("lora --precision fp32", 0), (f"lora --precision fp32 {GRAPH}", 1)):
        figures = gpu_checks.beside_the_cpu(made, command).values()
        assert sum(figure > limit for figure, limit in figures) == failures


@pytest.mark.parametrize(
    ("ok", "with_graph", "verdict"),
    [(True, 4.0, "turn it on"), (True, 6.0, "leave it off"), (False, 4.0, "leave it off")],
)
def test_the_last_line_is_the_default_that_the_machine_supports(ok, with_graph, verdict):
    checks = [{"name": f"lora {GRAPH}: a loss differs", "ok": ok}]
    name = "this project, LoRA, bf16"
    facts = {name: {"ms a step": 5.0}, f"{name}, graph": {"ms a step": with_graph}}
    line = verify_gpu.graph_default([{"checks": checks, "facts": facts}])
    assert line.startswith(f"--cuda-graph: {verdict}")


def test_a_check_or_a_contender_that_fails_fails_alone(opts, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    checks = {"one": broken, "two": lambda: {"a loss differs": (0, 0)}}
    monkeypatch.setattr(gpu_checks, "all_checks", lambda opts: checks)
    report = Report()
    gpu_checks.checks(opts, report)
    assert report.broken() == ["one: RuntimeError: CUDA error: an illegal memory access"]
    assert len(report.checks) == 2

    def measure(task):
        if task.method == "lora":
            raise RunError("out of memory")
        return {"median": 1.0, "busy_ms": 0.0, "launches": 0, "peak_mb": 1.0, "reserved_mb": 0.0}

    monkeypatch.setattr(gpu_speed, "measure", measure)
    report = Report()
    gpu_speed.speed(opts, report)
    assert report.broken() == ["this project, LoRA, bf16: out of memory"]  # the other may fail
    assert report.facts["PEFT, LoRA, bf16 autocast, failed"] == "out of memory"
    assert report.facts["this project, full, bf16"]["launches"] == 0


def test_on_cuda_our_step_is_timed_with_a_graph_and_without_compiled_and_not():
    opts = Namespace(device=ON_CUDA, dry_run=False, low="bf16", batch=16, block=128)
    names = [task.contender for task in gpu_speed.timed_tasks(opts, "base", "lora")]
    assert names == [
        "this project, LoRA, bf16",
        "this project, LoRA, bf16, graph",
        "PEFT, LoRA, bf16 autocast",
        "PEFT, LoRA, bf16 weights",
        "this project, LoRA, bf16, compiled",
        "this project, LoRA, bf16, compiled, graph",
        "PEFT, LoRA, bf16 autocast, compiled",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    line = one_line(run(verify_gpu.main, "--out", tmp_path / "out"), 2)
    assert "--dry-run" in line and not (tmp_path / "out").exists()
