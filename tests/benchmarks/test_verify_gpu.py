"""The GPU report: its checks pass on a CPU, and every seeded fault fails a check."""

import json
import math
from argparse import Namespace
from contextlib import nullcontext
from functools import cache, partial

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
from model import gpt2
from model.kernels import fast
from tests.runs import one_line, run
from training import variants
from training.optimizer import AdamW
from training.ranks import Ranks
from training.run import Run


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


def an_eighth_of_the_gradients(ranks, model, loss):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= 8


def the_first_batch_always(run, training, first=0, real=Run.batches):
    for _ in range(run.total_steps):
        yield next(real(run, training))


def a_loss_of_one_nat_more(tokens, scored_bytes, loss, accuracy, real=evaluate.Scores):
    return real(tokens, scored_bytes, loss + 1, accuracy)


def a_step_with_the_first_seed(*given, real=train.train_step):
    torch.manual_seed(0)
    return real(*given)


def the_next_token_shown(q, k, v, p):
    length = q.size(-2)
    mask = torch.ones(length, length, dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


def the_mean_of_a_micro_batch(batch, real=Batch.micro_batches):
    for inputs, targets in real(batch):
        object.__setattr__(batch, "num_tokens", targets.numel())
        yield inputs, targets


def dropout_in_evaluation(x, p, training, real=fast.dropout):
    return real(x, p, True)


def trained_in_low_precision(run, model, real=Run.set_up_model):
    real(run, model)
    model.to(run.device.dtype)


other_masks = partial(gpt2.checkpoint, preserve_rng_state=False)
FAULTS = [
    (Ranks, "all_reduce_gradients", an_eighth_of_the_gradients, "lora, beside PEFT"),
    (Run, "batches", the_first_batch_always, "lora, beside PEFT"),
    (evaluate, "Scores", a_loss_of_one_nat_more, "lora, beside PEFT"),
    (train, "train_step", a_step_with_the_first_seed, "dropout"),
    (fast, "causal_attention", the_next_token_shown, "full --precision fp32"),
    (AdamW, "load_state_dict", lambda *_: None, "--resume"),
    (Batch, "micro_batches", the_mean_of_a_micro_batch, "lora --precision fp32 --grad-accum 3"),
    (fast, "dropout", dropout_in_evaluation, "dropout"),
    (variants, "precondition", lambda model: None, "lora --riemannian --precision fp32"),
    (gpt2, "checkpoint", other_masks, "dropout"),
    (torch.amp.GradScaler, "unscale_", lambda *_: None, "lora --clip 0.1 --precision fp16"),
    (Run, "set_up_model", trained_in_low_precision, "full --precision bf16"),
    (Device, "autocast", lambda *_: nullcontext(), "full --precision bf16"),
]


@pytest.mark.parametrize(("where", "name", "wrong", "check"), FAULTS)
def test_a_seeded_fault_fails_the_dry_run(opts, monkeypatch, where, name, wrong, check):
    monkeypatch.setattr(where, name, wrong)
    figures = all_checks(opts)[check]().values()
    assert any(not figure <= limit for figure, limit in figures)


def test_a_dry_run_passes_and_writes_one_report(opts, tmp_path, monkeypatch):
    """Only the checks of the faults run. `make verify-gpu ARGS=--dry-run` runs all checks."""
    few = {check for *_, check in FAULTS} | {"two ranks"}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    line = one_line(run(verify_gpu.main, "--out", tmp_path / "out"), 2)
    assert "--dry-run" in line and not (tmp_path / "out").exists()
