"""The speed benchmark: both sides do the same work, and a failure is one line."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks import speed, speed_matmuls, speed_worker
from benchmarks.speed_tasks import AXES, Task, along, compare
from common.device import Device
from common.errors import RunError
from model.gpt2 import GPT2Config
from tests.helpers import tiny_gpt2, tiny_gpt2_directory, token_ids, write_small_tokenizer
from tests.ranks import fork
from tests.runs import run

BASE = {"n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
CPU = Device.pick("cpu", "fp32")
ROUNDS = 2
CONTENDERS = {
    "this project, LoRA, bf16",
    "PEFT, LoRA, bf16 autocast",
    "PEFT, LoRA, bf16 weights",
    "this project, full, bf16",
    "transformers, full, bf16 autocast",
    "this project, evaluate, bf16",
    "transformers, evaluate, bf16 autocast",
    "transformers, evaluate, bf16 weights",
    "this project, generate, bf16",
    "transformers, generate, bf16 autocast",
    "transformers, generate, bf16 weights",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base that sees a window of 32, without dropout."""
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), **BASE, **dropouts)[0]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with (
        mock.patch.object(speed_matmuls, "ENOUGH_SECONDS", 1e-4),
        mock.patch.object(speed_worker, "NEW_TOKENS", 16),
    ):
        yield


def bench(base: Path, out: Path, *options: object, measure=speed.run_apart):
    """The command; with `measure` in place of a process for each measurement."""
    standard = ["--base", base, "--out", out, "--device", "cpu", "--rounds", ROUNDS, "--steps", 3]
    with mock.patch.object(speed, "run_apart", measure):
        return run(speed.main, *standard, *options)


def read(out: Path, what: str = "speed") -> dict:
    assert next(out.glob(f"{what}-cpu-*.png")).read_bytes().startswith(b"\x89PNG")
    return json.loads(next(out.glob(f"{what}-cpu-*.json")).read_text())


def test_every_contender_is_timed_in_every_round_the_second_in_reverse(base, tmp_path):
    ending = bench(base, tmp_path, "--precision", "bf16", measure=speed_worker.measure)
    assert ending.status == 0, ending.stderr
    result = read(tmp_path)
    order = [record["name"] for record in result["measurements"]]
    assert set(order) == CONTENDERS
    assert len(order) == ROUNDS * len(CONTENDERS)
    assert order == order[::-1]
    assert all(min(record["seconds"]) > 0 for record in result["measurements"])
    assert len(result["summary"]["ratios"]) == 7  # each of theirs with ours of the same work
    assert str(base.parent) not in json.dumps(result)


def test_growth_and_scaling_have_every_size_that_the_base_allows(base, tmp_path, monkeypatch):
    sizes = {
        "growth": {"batch_size": (2, 32), "block_size": (32, 64), "r": (4, 64)},
        "scaling": {"ranks": (1,)},
    }
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = ["--only", "growth", "scaling", "--precision", "bf16", "--rounds", 1, "--steps", 1]
    with mock.patch.dict(AXES, sizes):
        ending = bench(base, tmp_path, *options, measure=speed_worker.measure)
    assert ending.status == 0, ending.stderr

    measured = [record["name"] for record in read(tmp_path, "growth")["measurements"]]
    expected = []
    for size in ("batch_size 2", "batch_size 32", "block_size 32", "r 4"):
        expected.append(f"this project, LoRA, bf16, {size}")
        expected.append(f"PEFT, LoRA, bf16 autocast, {size}")
    assert measured == expected
    assert [record["name"] for record in read(tmp_path, "scaling")["measurements"]] == [
        "this project, LoRA, bf16, ranks 1",
        "this project, full, bf16, ranks 1",
    ]


@pytest.mark.parametrize("method, n_inner", [("lora", None), ("full", 24)])
def test_the_matmuls_are_those_of_a_stock_training_step(method, n_inner):
    model = tiny_gpt2(**BASE, n_inner=n_inner, attn_implementation="eager").train()
    if method == "lora":
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=3, target_modules=["c_attn"], lora_dropout=0.05, fan_in_fan_out=True),
        )
    ids = token_ids(317, 5, 32)
    with FlopCounterMode(display=False) as stock:
        model(input_ids=ids, labels=ids).loss.backward()

    task = Task("train", "", method=method, batch_size=5, block_size=32, r=3)
    config = GPT2Config(vocab_size=317, n_inner=n_inner, **BASE)
    found = speed_matmuls.count_matmuls(task, config)
    flops = 0
    layouts = set()
    for operands, count in found.items():
        a, b = [torch.empty_strided(*operand) for operand in operands]
        layouts.add((a.is_contiguous(), b.is_contiguous()))
        with FlopCounterMode(display=False) as counter:
            torch.matmul(a, b)
        flops += count * counter.get_total_flops()
    assert flops == stock.get_total_flops()
    assert {(True, False), (True, True), (False, True)} <= layouts  # x W^T, g W, g^T x


@pytest.mark.parametrize(
    "kind, method",
    [("train", "lora"), ("train", "full"), ("evaluate", "lora"), ("generate", "lora")],
)
def test_both_sides_compute_the_same(base, kind, method):
    task = Task(kind, str(base), method=method, block_size=32)
    ours, theirs = [
        np.array(speed_worker.CALLS[kind](replace(task, side=side), CPU)())
        for side in ("ours", "theirs")
    ]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours.shape == ((16,) if kind == "generate" else ())


def test_without_a_base_it_makes_its_own_and_the_others_go_on_when_one_fails(tmp_path):
    small = GPT2Config(vocab_size=317, **BASE)
    bases = dict.fromkeys(("base", "gpt2-xl"), (small, torch.float32))

    def measure(task):
        if task.name == "transformers, generate, bf16 weights":
            raise RunError("out of memory")
        found = speed_worker.measure(task)
        if task.kind in bases:
            write_small_tokenizer(Path(task.base), small.vocab_size)
        return found

    options = ["--only", "generate", "gpt2-xl", "--precision", "bf16"]
    with mock.patch.dict(speed_worker.BASES, bases):
        ending = bench("", tmp_path, *options, measure=measure)
    assert ending.status == 1
    assert len(ending.stderr.splitlines()) == 1

    result = read(tmp_path, "generate")
    assert result["failed"] == {"transformers, generate, bf16 weights": "out of memory"}
    assert result["base"] == "GPT-2 124M, random weights"
    assert len(result["measurements"]) == 2 * ROUNDS

    large = read(tmp_path, "gpt2-xl")  # one round of LoRA
    assert large["base"] == "gpt2-xl, random weights"
    assert [(record["name"], record["batch_size"]) for record in large["measurements"]] == [
        ("this project, LoRA, bf16", 4),
        ("PEFT, LoRA, bf16 autocast", 4),
        ("PEFT, LoRA, bf16 weights", 4),
    ]


def test_two_ranks_are_processes_of_their_own_and_what_a_step_sends_is_counted(
    base, tmp_path, monkeypatch
):
    said = tmp_path / "said"
    trainable = BASE["n_layer"] * 8 * 4 * BASE["n_embd"]
    task = Task("train", str(base), block_size=32, ranks=2, steps=2)

    def torchrun(command, **options):
        started = "-m torch.distributed.run --standalone --nproc-per-node 2 -m"
        assert " ".join(command[1:7]) == started
        assert command[7] == "benchmarks.speed_worker"
        as_worker = mock.patch.object(train, "main", speed_worker.main)
        statuses, lines = fork(said, *[command[8:]] * 2, during=as_worker)
        assert statuses == [0, 0], lines
        return mock.Mock(returncode=0, stdout=(said / "out").read_text())

    monkeypatch.setattr(speed.subprocess, "run", torchrun)
    found = speed.run_apart(task)
    # Gradients and loss in one message; whether a checkpoint is due and a signal came, in another.
    assert found["bytes"] == 4 * (trainable + 1) + 2 * 8
    assert len(found["seconds"]) == 2
    assert found["all_reduce"] > 0


def test_one_rank_sends_nothing(base, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    found = speed_worker.measure(Task("train", str(base), block_size=32, ranks=1, steps=2))
    assert found["bytes"] == 0
    assert "all_reduce" not in found


@pytest.mark.parametrize("device, vocabulary", [("cpu", 317), ("cuda", 320)])
def test_on_cuda_the_head_is_measured_as_it_is_padded(base, monkeypatch, device, vocabulary):
    configs = []
    monkeypatch.setattr(
        speed_matmuls, "count_matmuls", lambda task, config: configs.append(config) or {}
    )
    speed_matmuls.measure_matmuls(Task("train", str(base)), torch.device(device))
    assert [config.vocab_size for config in configs] == [vocabulary]


def test_a_task_is_measured_in_a_process_of_its_own(base):
    found = speed.run_apart(Task("evaluate", str(base), steps=2, block_size=32))
    assert len(found["seconds"]) == 2
    assert found["peak_mb"] > 50


@pytest.mark.parametrize(
    "script, reason",
    [
        ("kill -9 $$", "its process was killed (out of memory?)"),
        ("printf 'Traceback\\nKeyError: 1\\n=====\\n' >&2; exit 1", "KeyError: 1"),
        ("printf 'error: no GPU\\ntorchrun: failed\\n' >&2; exit 1", "no GPU"),
        ("exit 3", "exit status 3"),
    ],
)
def test_a_process_that_fails_is_one_line_and_status_1(base, tmp_path, monkeypatch, script, reason):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    ending = bench(base, tmp_path, "--only", "evaluate", "--precision", "fp32")
    assert ending.status == 1
    assert ending.stderr.splitlines() == [
        f"error: this project, evaluate, fp32: {reason}; left out from here on",
        f"error: transformers, evaluate, fp32: {reason}; left out from here on",
    ]


def test_a_gpu_gets_the_ranks_and_the_compiled_runs_that_it_can_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opts = mock.Mock(
        task=Task("train", "base"),
        device="cuda",
        precision=["bf16"],
        config=GPT2Config(),
        only=["train"],
    )
    assert {task.ranks for task in along(opts, "scaling")} == {1, 2}
    assert [task.name for task in compare(opts) if task.compile] == [
        "this project, LoRA, bf16, compiled",
        "PEFT, LoRA, bf16 autocast, compiled",
        "this project, full, bf16, compiled",
        "transformers, full, bf16 autocast, compiled",
    ]


@pytest.mark.parametrize(
    "native, expected", [("bf16", ["fp32", "bf16", "fp16"]), ("fp16", ["fp32", "fp16"])]
)
def test_a_gpu_gets_its_native_precisions(monkeypatch, native, expected):
    device = Device(torch.device("cuda"), native)
    monkeypatch.setattr(Device, "pick", lambda *asked, **settings: device)
    assert speed.parse_args([]).precision == expected
