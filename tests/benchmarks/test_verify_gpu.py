"""The GPU's report: all of its script runs on a CPU, and a fault does not stay hidden."""

import json
import math
from argparse import Namespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu_learning, gpu_speed, ours, speed_worker, verify_gpu
from common.device import Device
from common.errors import RunError
from lora.layer import LoRALinear
from model.kernels import fast
from tests.helpers import tiny_gpt2_directory
from tests.runs import one_line, run
from training.launch import GraphedLoss


@pytest.fixture(autouse=True)
def small(tmp_path_factory, monkeypatch):
    """Take a tiny base in place of mini, and measure in this process."""
    base, _ = tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_head=2)
    monkeypatch.setattr(verify_gpu, "MINI", base)
    monkeypatch.setattr(gpu_speed, "run_apart", speed_worker.measure)


def verify(out, *argv):
    ending = run(verify_gpu.main, "--dry-run", "--out", out, *argv)
    report = json.loads((out / "gpu-report.json").read_text())
    return ending, {part["name"]: part for part in report["parts"]}


def broken(part) -> list[str]:
    return [check["name"] for check in part["checks"] if not check["ok"]]


def test_a_dry_run_runs_every_part_and_writes_one_report(tmp_path):
    ending, parts = verify(tmp_path)
    assert ending.status == 0, ending
    assert parts.keys() == verify_gpu.PARTS.keys()
    assert {part["result"] for part in parts.values()} == {"ok"}
    learned = [check["name"] for check in parts["learning"]["checks"]]
    for method in ("lora", "full"):
        for case in ("fp32", "fp32, checkpointing", "fp32, 3 parts", "bf16", "bf16, 3 parts"):
            assert f"{method}, {case}: what it learns, over PEFT's, from 1" in learned
    assert len(learned) == 2 * 2 * 6
    left_out = {"lora, compiled", "lora, --data", "lora, graph"}
    assert parts["no-waiting"]["facts"].keys() == gpu_learning.WAITING.keys() - left_out
    rows = parts["speed"]["facts"]
    assert rows["this project, LoRA, bf16"]["time / ours"] == 1
    assert rows["PEFT, LoRA, bf16 autocast"]["ms a step"] > 0
    assert rows["transformers, full, bf16 autocast"]["peak / ours"] > 0

    text = (tmp_path / "gpu-report.md").read_text()
    assert text.startswith("# GPU report: dry run on a CPU")
    assert [part for part in parts if f"\n## {part}\n" in text] == list(parts)
    assert str(tmp_path) not in text


def skip_the_optimizer(monkeypatch):
    def make_trainer(args, make=ours.Trainer):
        trainer = make(args)
        trainer.optimizer.step = lambda *_: None
        return trainer

    monkeypatch.setattr(ours, "Trainer", make_trainer)


def leave_the_scale_out(monkeypatch):
    def update(layer, x, y):
        return layer.lora_B(layer.lora_A(layer.lora_dropout(x)))

    monkeypatch.setattr(LoRALinear, "update", update)


def show_the_next_token(monkeypatch):
    def attend(q, k, v, p):
        length = q.size(-2)
        mask = torch.ones(length, length, dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    monkeypatch.setattr(fast, "causal_attention", attend)


GRAPH = "graphs that could not be captured"
ON_CUDA = Device(torch.device("cuda"), "fp32")
LEARNS = "what it learns, over PEFT's, from 1"


@pytest.mark.parametrize(
    "spoil, found",
    [
        (skip_the_optimizer, {"lora, fp32", "lora, bf16", "full, fp32", "full, bf16"}),
        (leave_the_scale_out, {"lora, fp32", "lora, bf16"}),
    ],
)
def test_a_run_that_learns_too_little_fails_in_every_precision(tmp_path, monkeypatch, spoil, found):
    spoil(monkeypatch)
    ending, parts = verify(tmp_path, "--only", "learning")
    assert ending.status == 1 and "failed: learning" in ending.stdout
    names = broken(parts["learning"])
    assert {f"{case}: {LEARNS}" for case in found} <= set(names)
    assert not any("start" in name for name in names)


def test_a_mask_that_shows_the_next_token_fails_before_the_first_step(tmp_path, monkeypatch):
    show_the_next_token(monkeypatch)
    ending, parts = verify(tmp_path, "--only", "learning")
    assert ending.status == 1
    for case in ("lora, fp32", "lora, fp32, 3 parts", "full, fp32"):
        assert f"{case}: loss at the start, relative" in broken(parts["learning"])


def test_a_case_that_raises_fails_alone(tmp_path, monkeypatch):
    def make_trainer(args, make=ours.Trainer):
        if args.gradient_checkpointing:
            raise RuntimeError("CUDA error: an illegal memory access\nmore")
        return make(args)

    monkeypatch.setattr(ours, "Trainer", make_trainer)
    ending, parts = verify(tmp_path, "--only", "learning")
    error = "RuntimeError: CUDA error: an illegal memory access"
    assert ending.status == 1
    assert broken(parts["learning"]) == [
        f"lora, fp32, checkpointing: {error}",
        f"full, fp32, checkpointing: {error}",
    ]
    assert len(parts["learning"]["checks"]) == 2 * (2 * 5 + 1)


def test_a_contender_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    def measure(task, measure=speed_worker.measure):
        if task.method == "lora" and (task.side == "ours" or task.weights == "low"):
            raise RunError("out of memory")
        return measure(task)

    monkeypatch.setattr(gpu_speed, "run_apart", measure)
    ending, parts = verify(tmp_path, "--only", "speed")
    assert ending.status == 1
    assert broken(parts["speed"]) == ["this project, LoRA, bf16: out of memory"]  # theirs may fail
    facts = parts["speed"]["facts"]
    assert facts["PEFT, LoRA, bf16 weights, failed"] == "out of memory"
    assert facts["this project, full, bf16"]["launches"] == 0


def test_on_cuda_our_step_is_timed_with_a_graph_and_without_compiled_and_not():
    opts = Namespace(device=ON_CUDA, dry_run=False, low="bf16", batch=16, block=128, steps=20)
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


@pytest.mark.parametrize("graph, failed", [(None, ["lora: " + GRAPH]), (mock.Mock(), [])])
def test_a_capture_that_failed_is_no_secret(graph, failed):
    loss = mock.Mock(spec=GraphedLoss, graphed=graph)
    report = gpu_learning.Report()
    gpu_learning.check_graph(report, "lora", mock.Mock(**{"model.loss": loss}))
    assert report.broken() == failed


def test_what_is_no_number_fails():
    report = gpu_learning.Report()
    gpu_learning.compare(report, "lora, fp32", [math.nan, math.nan], [4.0, 3.0])
    assert len(report.broken()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    line = one_line(run(verify_gpu.main, "--out", tmp_path / "out"), 2)
    assert "--dry-run" in line and not (tmp_path / "out").exists()
