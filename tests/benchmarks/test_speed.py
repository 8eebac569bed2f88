"""The speed benchmark: both sides do the same work, and a failure is one line."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import train
from benchmarks import speed, speed_worker
from benchmarks.speed_tasks import AXES, BASES, Task, parameters, sides
from common.device import Device
from common.errors import RunError
from model.gpt2 import GPT2Config
from model.kernels import fast
from storage.weights import load_config
from tests.helpers import tiny_gpt2_directory, write_small_tokenizer
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
ALIKE = {
    f"{contender}, allocator alike"
    for contender in CONTENDERS
    if sys.platform == "linux" and not contender.startswith("this project")
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base with a context of 32 tokens, without dropout."""
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), **BASE, **dropouts)[0]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with mock.patch.object(speed_worker, "NEW_TOKENS", 16):
        yield


def bench(base: Path, out: Path, *options: object, measure=speed.run_apart):
    """Run the command. `measure` replaces the separate process for each measurement."""
    standard = ["--base", base, "--out", out, "--device", "cpu", "--rounds", ROUNDS, "--steps", 3]
    with mock.patch.object(speed, "run_apart", measure):
        return run(speed.main, *standard, *options)


def read(out: Path, what: str = "speed") -> dict:
    assert next(out.glob(f"{what}-cpu-*.png")).read_bytes().startswith(b"\x89PNG")
    return json.loads(next(out.glob(f"{what}-cpu-*.json")).read_text())


def test_every_contender_is_timed_in_every_round_the_second_in_reverse(base, tmp_path):

    def measure(task):
        return {"median": 1.0, "peak_mb": 100.0, "matmuls_share": 0.75}

    ending = bench(base, tmp_path, "--precision", "bf16", "--steps", 1, measure=measure)
    assert ending.status == 0, ending.stderr
    result = read(tmp_path)
    order = [record["name"] for record in result["measurements"]]
    assert set(order) == CONTENDERS | ALIKE
    assert len(order) == ROUNDS * len(CONTENDERS | ALIKE)
    assert order == order[::-1]
    assert len(result["load_average"]) == ROUNDS
    assert str(base.parent) not in json.dumps(result)


def test_the_first_ratio_is_with_the_allocator_alike_the_second_as_they_come(base, tmp_path):
    """Their side takes 3 times our time by default, and 2 times with our allocator setting."""

    def measure(task):
        seconds = 1.0
        memory = 100.0
        if task.side == "theirs":
            seconds = 2.0 if task.allocator_alike else 3.0
            memory = 500.0 if task.allocator_alike else 400.0
        return {"median": seconds, "peak_mb": memory, "matmuls_share": 0.75}

    options = ["--only", "train", "--precision", "fp32"]
    ending = bench(base, tmp_path, *options, measure=measure)
    assert ending.status == 0, ending.stderr
    table = [re.split(r" *\| *", line) for line in ending.stdout.splitlines() if " : " in line]
    figures = ["1", "100", "2.00", "3.00", "0.25", "75%"]
    if not ALIKE:
        figures.remove("2.00")
    assert [row[1:-1] for row in table] == [
        ["this project, LoRA, fp32 : PEFT, LoRA, fp32", *figures],
        ["this project, full, fp32 : transformers, full, fp32", *figures],
    ]


def test_growth_and_scaling_have_every_size_that_the_base_allows(base, tmp_path):
    sizes = {
        "growth": {"batch_size": (2, 32), "block_size": (32, 64), "r": (4, 64)},
        "scaling": {"ranks": (1,)},
    }
    models = {
        name: GPT2Config(317, **BASE | {"n_embd": n}) for name, n in (("mini", 8), ("base", 16))
    }

    def measure(task):
        if task.kind in models:
            return speed_worker.measure(task)
        if task.parameters:
            assert parameters(load_config(Path(task.base))) == task.parameters
        return {"median": 1.0, "peak_mb": 100.0}

    options = ["--only", "growth", "scaling", "--precision", "bf16", "--rounds", 1]
    with (
        mock.patch.dict(AXES, sizes),
        mock.patch.object(speed, "BASES", models),
        mock.patch.object(speed_worker, "BASES", models),
    ):
        ending = bench(base, tmp_path, *options, measure=measure)
    assert ending.status == 0, ending.stderr

    measured = [record["name"] for record in read(tmp_path, "growth")["measurements"]]
    expected = []
    theirs = "PEFT, LoRA, bf16 autocast"
    if ALIKE:
        theirs += ", allocator alike"
    small, large = [f"parameters {parameters(models[name]):,}" for name in models]
    for size in ("batch_size 2", "batch_size 32", "block_size 32", "r 4", small, large):
        expected.append(f"this project, LoRA, bf16, {size}")
        expected.append(f"{theirs}, {size}")
    assert measured == expected
    assert [record["name"] for record in read(tmp_path, "scaling")["measurements"]] == [
        "this project, LoRA, bf16, ranks 1",
        "this project, full, bf16, ranks 1",
    ]


def test_exponents_are_the_slopes_of_what_was_measured(base, tmp_path):
    """For us, time grows as the square of the batch and memory as its root. PEFT is linear."""

    def measure(task):
        size = float(task.batch_size)
        if task.side == "ours":
            return {"median": 3 * size**2, "peak_mb": 1000 * size**0.5}
        return {"median": 5 * size, "peak_mb": 2000}

    options = ["--only", "growth", "--rounds", 1]
    with (
        mock.patch.dict(AXES, {"growth": {"batch_size": (1, 4, 16)}}),
        mock.patch.object(speed, "BASES", {}),
    ):
        ending = bench(base, tmp_path, *options, measure=measure)
    assert ending.status == 0, ending.stderr
    table = [re.split(r" *\| *", line) for line in ending.stdout.splitlines() if " by " in line]
    assert [row[2:7] for row in table] == [
        ["1..16", "3..768", "2.00", "5..80", "1.00"],
        ["1..16", "1,000..4,000", "0.50", "2,000..2,000", "0.00"],
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="no allocator's setting there")
def test_our_allocator_setting_is_ours_and_their_second_measurements_alone(base, monkeypatch):
    tune_process = mock.Mock()
    monkeypatch.setattr(speed_worker, "tune_process", tune_process)
    monkeypatch.setitem(speed_worker.CALLS, "evaluate", lambda *_: lambda: torch.ones(9))
    counts = []
    for task in sides(Task("evaluate", str(base), steps=1, warm_up=0)):
        tune_process.reset_mock()
        speed_worker.measure(task)
        counts.append(tune_process.call_count)
    assert counts == [1, 0, 1]


def test_the_matmuls_share_is_their_own_time_over_that_of_all(base):
    """The share is near 1 if a call only multiplies matrices, and 0 if it only adds."""
    x = torch.ones(512, 512)

    def share(call):
        return speed_worker.profiled(call, CPU)["matmuls_share"]

    assert share(lambda: [x @ x for _ in range(20)]) > 0.9
    assert share(lambda: [x + x for _ in range(20)]) == 0
    assert share(lambda: fast.linear(x, x)) > 0.5  # computed by oneDNN


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

    def measure(task):
        if task.name == "transformers, generate, bf16 weights":
            raise RunError("out of memory")
        found = speed_worker.measure(task)
        if task.kind == "base":
            write_small_tokenizer(Path(task.base), small.vocab_size)
        return found

    options = ["--only", "generate", "--precision", "bf16"]
    with mock.patch.dict(BASES, {"base": small}):
        ending = bench("", tmp_path, *options, measure=measure)
    assert ending.status == 1
    assert len(ending.stderr.splitlines()) == 1

    result = read(tmp_path, "generate")
    assert result["failed"] == {"transformers, generate, bf16 weights": "out of memory"}
    assert result["base"] == "GPT-2 124M, random weights"
    unlike = [r for r in result["measurements"] if not r["allocator_alike"]]
    assert len(unlike) == 2 * ROUNDS


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
    # One message has the gradients and the loss. Another asks for checkpoints and signals.
    assert found["bytes"] == 4 * (trainable + 1) + 2 * 8
    assert len(found["seconds"]) == 2
    assert found["all_reduce"] > 0


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
    ],
)
def test_a_process_that_fails_is_one_line_and_status_1(base, tmp_path, monkeypatch, script, reason):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    ending = bench(base, tmp_path, "--only", "evaluate", "--precision", "fp32")
    assert ending.status == 1
    assert ending.stderr.splitlines()[:2] == [
        f"error: this project, evaluate, fp32: {reason}; left out from here on",
        f"error: transformers, evaluate, fp32: {reason}; left out from here on",
    ]
