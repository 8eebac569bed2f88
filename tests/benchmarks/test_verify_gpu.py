"""The GPU's report: all of its script that can runs on a CPU, and a fault does not stay hidden."""

import json

import pytest
import torch

from benchmarks import gpu_peft, gpu_training, speed_worker, verify_gpu
from benchmarks.gpu_operations import PLAIN
from model import fast
from tests.helpers import tiny_gpt2_directory
from tests.ranks import fork
from tests.runs import one_line, run


def verify(out, *argv):
    ending = run(verify_gpu.main, "--dry-run", "--out", out, *argv)
    report = json.loads((out / "gpu-report.json").read_text())
    return ending, {part["name"]: part for part in report["parts"]}


def test_a_dry_run_runs_every_part_or_says_why_not(tmp_path, monkeypatch):
    def torchrun(command, **options):
        started = " ".join(command[1:7])
        assert started == "-m torch.distributed.run --standalone --nproc-per-node 2 train.py"
        statuses, lines = fork(tmp_path / "said", *[command[7:]] * 2)
        assert statuses == [0, 0], lines

    # In this process and in forked ones, which saves six imports of torch; in place of mini a tiny
    # base, with heads of 16 (tests/benchmarks/test_parity.py).
    base, _ = tiny_gpt2_directory(tmp_path / "base", n_head=2)
    monkeypatch.setattr(verify_gpu, "MINI", base)
    monkeypatch.setattr(gpu_peft, "run_apart", speed_worker.measure)
    monkeypatch.setattr(gpu_training.subprocess, "run", torchrun)
    ending, parts = verify(tmp_path)
    assert ending.status == 0, ending
    assert parts.keys() == verify_gpu.PARTS.keys()
    skipped = {name: part["why"] for name, part in parts.items() if part["result"] != "ok"}
    assert skipped == {"no-waiting": "on a CPU there is nothing to wait for"}
    assert len(parts["operations"]["checks"]) == 12 and len(parts["options"]["checks"]) == 10
    assert all(check["ok"] for part in parts.values() for check in part["checks"])
    assert parts["speed"]["facts"]["this project, LoRA, bf16"]["ms a step"] > 0

    text = (tmp_path / "gpu-report.md").read_text()
    assert text.startswith("# GPU report: dry run on a CPU")
    assert [part for part in parts if f"\n## {part}\n" in text] == list(parts)
    assert str(tmp_path) not in text


def test_a_fault_and_an_exception_fail_and_the_next_part_runs(tmp_path, monkeypatch):
    def wrong(*args):
        return 1.01 * PLAIN["linear"](*args)

    def raises(opts, report):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(fast, "linear", wrong)
    monkeypatch.setitem(verify_gpu.PARTS, "resume", raises)
    ending, parts = verify(tmp_path, "--only", "operations", "resume", "empty-share")
    assert ending.status == 1
    assert [part["result"] for part in parts.values()] == ["failed", "failed", "ok"]
    assert "fp32: linear" in parts["operations"]["why"]
    assert "attention" not in parts["operations"]["why"]
    assert parts["resume"]["why"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "failed: operations, resume" in ending.stdout


def test_a_fault_in_a_gradient_alone_is_found(tmp_path, monkeypatch):
    def wrong_gradient(*args):
        y = PLAIN["causal_attention"](*args)
        return 1.01 * y - (0.01 * y).detach()

    monkeypatch.setattr(fast, "causal_attention", wrong_gradient)
    ending, parts = verify(tmp_path, "--only", "operations")
    broken = [check["name"] for check in parts["operations"]["checks"] if not check["ok"]]
    assert ending.status == 1
    assert broken == ["fp32: attention, 33 tokens", "fp32: attention, 300 tokens"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    line = one_line(run(verify_gpu.main, "--out", tmp_path / "out"), 2)
    assert "--dry-run" in line and not (tmp_path / "out").exists()
