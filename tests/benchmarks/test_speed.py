"""The speed benchmark: every figure is there, follows from its times, and times the same work."""

import json
import statistics
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks import speed, speed_worker
from benchmarks.speed_worker import CALLS, Task
from common.device import Device
from common.errors import RunError
from model.gpt2 import GPT2Config
from model.weights import load_config
from tests.helpers import tiny_gpt2, tiny_gpt2_directory, token_ids, write_small_tokenizer
from tests.ranks import fork
from tests.runs import run

BASE = {"n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
CPU = Device.pick("cpu", "fp32")
ROUNDS = 2
AXES = {
    "growth": {"batch_size": (2, 32), "block_size": (32, 64), "r": (4, 64)},
    "scaling": {"ranks": (1, 2)},
}
SIDES = {
    "LoRA": ("PEFT", True),
    "full": ("transformers", False),
    "evaluate": ("transformers", True),
    "generate": ("transformers", True),
}
CONTENDERS = {
    name
    for what, (who, low) in SIDES.items()
    for name in (
        f"this project, {what}, fp32",
        f"{who}, {what}, fp32",
        f"this project, {what}, bf16",
        f"{who}, {what}, bf16 autocast",
        *[f"{who}, {what}, bf16 weights"] * low,
    )
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base that sees a window of 32, without dropout."""
    return tiny_gpt2_directory(
        tmp_path_factory.mktemp("base"), **BASE, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    )[0]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with (
        mock.patch.object(speed_worker, "ENOUGH_SECONDS", 1e-4),
        mock.patch.object(speed_worker, "NEW_TOKENS", 16),
        mock.patch.object(speed, "AXES", AXES),
    ):
        yield


def bench(base: Path, out: Path, *options: object, measure=None):
    """The command; with `measure` in place of a process for each measurement."""
    with mock.patch.object(speed, "run_apart", measure or speed.run_apart):
        return run(
            speed.main,
            "--base",
            base,
            "--out",
            out,
            "--device",
            "cpu",
            "--rounds",
            ROUNDS,
            "--steps",
            3,
            *options,
        )


def read(out: Path, what: str = "speed") -> dict:
    assert next(out.glob(f"{what}-cpu-*.png")).read_bytes().startswith(b"\x89PNG")
    return json.loads(next(out.glob(f"{what}-cpu-*.json")).read_text())


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    """A whole run: how it ended and where its files are."""
    out = tmp_path_factory.mktemp("results")
    ending = bench(base, out, "--only", *speed.KINDS, "growth", measure=speed_worker.measure)
    assert ending.status == 0, ending.stderr
    return ending, out


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def quotients(over: list[float], under: list[float]) -> dict:
    rounds = [a / b for a, b in zip(over, under, strict=True)]
    return {"rounds": rounds, **spread(rounds)}


def test_every_contender_is_timed_in_every_round_and_every_figure_follows(measured, base):
    ending, out = measured
    result, text = read(out), ending.stdout
    records = {
        name: [r for r in result["measurements"] if r["name"] == name] for name in CONTENDERS
    }
    seconds = {
        name: [statistics.median(r["seconds"]) for r in rounds] for name, rounds in records.items()
    }
    memory = {name: [r["peak_mb"] for r in rounds] for name, rounds in records.items()}
    figures = result["summary"]["contenders"]
    assert figures.keys() == CONTENDERS and result["failed"] == {}
    assert {"date", "machine", "threads", "load_average", "versions", "how"} <= result.keys()
    assert str(base.parent) not in json.dumps(result)
    order = [r["name"] for r in result["measurements"]]
    assert order == order[::-1]  # the second round is in reverse
    for name, found in seconds.items():
        assert len(found) == ROUNDS and min(found) > 0 and min(memory[name]) > 50
        assert figures[name]["seconds"] == spread(found)
        trains = "LoRA" in name or "full" in name
        assert ("share_of_limit" in figures[name]) == (trains and name.startswith("this project"))
    ratios = result["summary"]["ratios"]
    assert len(ratios) == 11
    for ratio in ratios:
        ours, theirs = ratio["ours"], ratio["theirs"]
        assert theirs.split(",")[1] == ours.split(",")[1]
        assert ratio["time"] == quotients(seconds[theirs], seconds[ours])
        assert ratio["memory"] == quotients(memory[ours], memory[theirs])
        assert f"{ratio['time']['median']:.2f} (" in text
    for method, precision in product(("LoRA", "full"), ("fp32", "bf16")):
        name = f"this project, {method}, {precision}"
        shares = [r["matmul_seconds"] / statistics.median(r["seconds"]) for r in records[name]]
        assert figures[name]["share_of_limit"] == spread(shares) and min(shares) > 0


def test_growth_has_every_size_that_the_base_allows_and_ratios_at_each(measured):
    summary = read(measured[1], "growth")["summary"]
    ours, theirs = "this project, LoRA, bf16", "PEFT, LoRA, bf16 autocast"
    sizes = [("batch_size", 2), ("batch_size", 32), ("block_size", 32), ("r", 4)]
    names = [[f"{who}, {axis} {size}" for axis, size in sizes] for who in (ours, theirs)]
    assert list(summary["contenders"]) == [
        name for pair in zip(*names, strict=True) for name in pair
    ]
    assert [(r["ours"], r["theirs"]) for r in summary["ratios"]] == list(zip(*names, strict=True))
    small, large = (summary["contenders"][name]["seconds"]["median"] for name in names[0][:2])
    assert large > small


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
    found = speed_worker.count_matmuls(task, config)
    flops = 0
    for (a, b), count in found.items():
        with FlopCounterMode(display=False) as counter:
            torch.matmul(torch.empty_strided(*a), torch.empty_strided(*b))
        flops += count * counter.get_total_flops()
    assert flops == stock.get_total_flops()
    layouts = {tuple(torch.empty_strided(*t).is_contiguous() for t in pair) for pair in found}
    assert {(True, False), (True, True), (False, True)} <= layouts  # x W^T, g W, g^T x


def test_the_limit_is_the_time_of_every_matmul_by_the_faster_way(base, monkeypatch):
    def timer(way, **more):
        seconds = 1.0 if way.startswith("ops") else 3.0
        return SimpleNamespace(blocked_autorange=lambda **_: SimpleNamespace(median=seconds))

    monkeypatch.setattr(speed_worker, "Timer", timer)
    task = Task("train", str(base), batch_size=5, block_size=32, r=3)
    found = speed_worker.count_matmuls(task, load_config(base))
    expected = sum(n * (1 if len(shape) == 2 else 3) for ((shape, _), _), n in found.items())
    assert speed_worker.measure_matmuls(task, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    "kind, method",
    [("train", "lora"), ("train", "full"), ("evaluate", "lora"), ("generate", "lora")],
)
def test_both_sides_compute_the_same(base, kind, method):
    task = Task(kind, str(base), method=method, block_size=32)
    ours, theirs = (
        np.array(CALLS[kind](replace(task, side=side), CPU)()) for side in ("ours", "theirs")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours.shape == ((16,) if kind == "generate" else ())


def test_without_a_base_it_makes_its_own_and_the_others_go_on_when_one_fails(tmp_path):
    def measure(task):
        if task.name == "transformers, generate, bf16 weights":
            raise RunError("out of memory")
        found = speed_worker.measure(task)
        if task.kind in speed_worker.BASES:
            write_small_tokenizer(Path(task.base), small[0].vocab_size)
        return found

    small = GPT2Config(vocab_size=317, **BASE), torch.float32
    with mock.patch.dict(speed_worker.BASES, {"base": small, "gpt2-xl": small}):
        ending = bench(
            "", tmp_path, "--only", "generate", "gpt2-xl", "--precision", "bf16", measure=measure
        )
    result = read(tmp_path, "generate")
    assert ending.status == 1 and len(ending.stderr.splitlines()) == 1
    assert result["failed"] == {"transformers, generate, bf16 weights": "out of memory"}
    assert result["base"] == "GPT-2 124M, random weights"
    assert len(result["measurements"]) == 2 * ROUNDS and len(result["summary"]["ratios"]) == 1
    large = read(tmp_path, "gpt2-xl")  # one round of LoRA
    assert large["base"] == "gpt2-xl, random weights" and large["rounds"] == 1
    assert [(r["name"], r["round"], r["batch_size"]) for r in large["measurements"]] == [
        (name, 0, 4)
        for name in (
            "this project, LoRA, bf16",
            "PEFT, LoRA, bf16 autocast",
            "PEFT, LoRA, bf16 weights",
        )
    ]


def test_two_ranks_are_processes_of_their_own_and_what_a_step_sends_is_counted(
    base, tmp_path, monkeypatch
):
    def of_lora(opts, part, along=speed.along):
        return [task for task in along(opts, part) if task.method == "lora"]

    def measure(task, apart=speed.run_apart):
        return (apart if task.ranks > 1 else speed_worker.measure)(task)

    def torchrun(command, **options):
        assert command[1:8] == [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "benchmarks.speed_worker",
        ]
        statuses, lines = fork(
            tmp_path / "said",
            *[command[8:]] * 2,
            during=mock.patch.object(train, "main", speed_worker.main),
        )
        assert statuses == [0, 0], lines
        return mock.Mock(returncode=0, stdout=(tmp_path / "said" / "out").read_text())

    monkeypatch.setattr(speed.subprocess, "run", torchrun)
    monkeypatch.setattr(speed, "along", of_lora)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    ending = bench(
        base,
        tmp_path,
        "--only",
        "scaling",
        "--precision",
        "fp32",
        "--rounds",
        1,
        "--steps",
        2,
        measure=measure,
    )
    assert ending.status == 0, ending.stderr
    found = read(tmp_path, "scaling")["summary"]["contenders"]
    one, two = (found[f"this project, LoRA, fp32, ranks {n}"] for n in (1, 2))
    trainable = BASE["n_layer"] * 8 * 4 * BASE["n_embd"]
    # Gradients and loss; whether a checkpoint is due, and whether a signal came.
    assert two["bytes"]["median"] == 4 * (trainable + 1) + 1 + 8
    assert one["bytes"]["median"] == 0 and one["faster"]["median"] == 1
    assert two["faster"]["median"] == pytest.approx(
        one["seconds"]["median"] / two["seconds"]["median"]
    )
    assert two["seconds"]["median"] > 0 and two["all_reduce"]["median"] > 0
    assert f"{two['bytes']['median']:,}" in ending.stdout


def test_a_task_is_measured_in_a_process_of_its_own(base):
    found = speed.run_apart(Task("evaluate", str(base), steps=2, block_size=32))
    assert len(found["seconds"]) == 2 and found["peak_mb"] > 50


def test_a_process_that_fails_is_one_line_and_status_1(base, tmp_path, monkeypatch):
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for script, reason in (
        ("kill -9 $$", "its process was killed (out of memory?)"),
        ("printf 'Traceback\\nKeyError: 1\\n=====\\n' >&2; exit 1", "KeyError: 1"),
        ("printf 'error: no GPU\\ntorchrun: failed\\n' >&2; exit 1", "no GPU"),
        ("exit 3", "exit status 3"),
    ):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        ending = bench(base, tmp_path, "--only", "evaluate", "--precision", "fp32")
        assert ending.status == 1
        assert ending.stderr.splitlines() == [
            f"error: {who}, evaluate, fp32: {reason}; left out from here on"
            for who in ("this project", "transformers")
        ]


def test_a_gpu_gets_the_ranks_the_precisions_and_the_compiled_runs_that_it_can_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opts = mock.Mock(
        task=Task("train", "base"),
        device="cuda",
        precision=["bf16"],
        config=GPT2Config(),
        only=["train"],
    )
    assert {task.ranks for task in speed.along(opts, "scaling")} == {1, 2}
    assert [task.name for task in speed.compare(opts) if task.compile] == [
        f"{name}, compiled"
        for name in (
            "this project, LoRA, bf16",
            "PEFT, LoRA, bf16 autocast",
            "this project, full, bf16",
            "transformers, full, bf16 autocast",
        )
    ]
    monkeypatch.setattr(sys, "argv", ["speed"])
    for native, expected in (("bf16", ["fp32", "bf16", "fp16"]), ("fp16", ["fp32", "fp16"])):
        device = Device(torch.device("cuda"), native)
        monkeypatch.setattr(Device, "pick", lambda *_, found=device, **__: found)
        assert speed.parse_args().precision == expected
