"""The speed benchmark: every figure is there, follows from its times, and times the same work."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed, speed_products, speed_worker
from benchmarks.speed_worker import CALLS, Task
from errors import RunError
from model.checkpoint import load_config
from model.gpt2 import GPT2Config
from tests.helpers import tiny_gpt2, tiny_gpt2_directory, token_ids
from tests.runs import run

BASE = {"n_positions": 128, "n_embd": 16, "n_head": 2, "n_layer": 2}
CPU = torch.device("cpu")
ROUNDS = 2
TRAINED = {"this project, LoRA, fp32", "PEFT, LoRA, fp32", "this project, LoRA, bf16",
           "PEFT, LoRA, bf16 autocast", "PEFT, LoRA, bf16 weights", "this project, full, fp32",
           "transformers, full, fp32", "this project, full, bf16",
           "transformers, full, bf16 autocast"}
RUN = {f"{who}, {what}, {how}" for what in ("evaluate", "generate") for who, how in (
    ("this project", "fp32"), ("transformers", "fp32"), ("this project", "bf16"),
    ("transformers", "bf16 autocast"), ("transformers", "bf16 weights"))}
STORED = {f"{who}, {what}, fp32" for what in ("save", "load") for who in ("this project", "PEFT")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base that sees a window of 128, without dropout."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), **BASE, embd_pdrop=0.0,
                               attn_pdrop=0.0, resid_pdrop=0.0)[0]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with (mock.patch.object(speed_products, "ENOUGH_SECONDS", 0.0),
          mock.patch.multiple(speed, GROWTH_ROUNDS=1, GROWTH_STEPS=1)):
        yield


def bench(base: Path, out: Path, *options: object, measure=speed_worker.measure):
    """The command, with `measure` in place of a process for each measurement."""
    with mock.patch.object(speed, "run_apart", measure):
        return run(speed.main, "--base", base, "--out", out, "--device", "cpu", "--rounds", ROUNDS,
                   "--steps", 1, *options)


def read(out: Path, what: str = "speed") -> dict:
    return json.loads(next(out.glob(f"{what}-cpu-*.json")).read_text())


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    """A whole run: how it ended and where its files are."""
    out = tmp_path_factory.mktemp("results")
    ending = bench(base, out, "--only", *speed.PARTS)
    assert ending.status == 0, ending.stderr
    return ending, out


def times(result: dict, key: str = "median") -> dict[str, list[float]]:
    """Each contender's figures, round by round."""
    return {name: [r[key] for i in range(ROUNDS) for r in result["measurements"]
                   if (r["name"], r["round"]) == (name, i)] for name in TRAINED | RUN | STORED}


def test_every_contender_is_timed_in_every_round(measured, base):
    result = read(measured[1])
    assert set(result["summary"]["contenders"]) == TRAINED | RUN | STORED
    for record in result["measurements"]:
        assert record["kind"] == "products" or record["median"] == statistics.median(
            record["seconds"])
    for name, seconds in times(result).items():
        figures = result["summary"]["contenders"][name]
        assert len(seconds) == ROUNDS and min(seconds) > 0
        assert figures["seconds"] == {"median": statistics.median(seconds), "min": min(seconds),
                                      "max": max(seconds)}
        assert figures["peak_mb"]["min"] > 50
        tokens = {"generate": 112}.get(figures["kind"], 16 * 128)
        assert figures["tokens_per_second"]["max"] == pytest.approx(tokens / min(seconds))
    assert {"date", "machine", "threads", "load_average", "versions", "how"} <= result.keys()
    assert result["failed"] == {} and str(base.parent) not in json.dumps(result)


def test_ratios_are_those_of_the_recorded_times_within_each_round(measured):
    ending, out = measured
    result = read(out)
    seconds, memory = times(result), times(result, "peak_mb")
    found = {(r["theirs"], r["ours"]): r for r in result["summary"]["ratios"]}
    for (theirs, ours), ratio in found.items():
        expected = [a / b for a, b in zip(seconds[theirs], seconds[ours], strict=True)]
        assert ratio["time"]["rounds"] == pytest.approx(expected)
        assert ratio["time"]["median"] == pytest.approx(statistics.median(expected))
        assert (ratio["time"]["min"], ratio["time"]["max"]) == (min(expected), max(expected))
        smaller = [a / b for a, b in zip(memory[ours], memory[theirs], strict=True)]
        assert ratio["memory"]["median"] == pytest.approx(statistics.median(smaller))
        assert f"{ratio['time']['median']:.2f} (" in ending.stdout
    kinds = [(a.split(",")[1], b.split(",")[1]) for a, b in found]
    assert all(a == b for a, b in kinds) and len(found) == 14
    assert ("PEFT, LoRA, fp32", "this project, LoRA, bf16") in found  # the reference's script
    assert ("transformers, full, fp32", "this project, full, bf16") not in found


def test_lora_over_full_and_the_share_of_the_limit_follow_from_the_times(measured):
    result = read(measured[1])
    seconds = times(result)
    limits = {(r["precision"], r["round"]): r["limits"] for r in result["measurements"]
              if r["kind"] == "products"}
    assert len(limits) == 2 * ROUNDS
    for precision in ("fp32", "bf16"):
        lora, full = (seconds[f"this project, {m}, {precision}"] for m in ("LoRA", "full"))
        over = next(r for r in result["summary"]["lora_over_full"] if precision in r["lora"])
        assert over["time"]["rounds"] == pytest.approx([a / b for a, b in zip(lora, full,
                                                                              strict=True)])
        for method, steps in (("lora", lora), ("full", full)):
            name = f"this project, {'LoRA' if method == 'lora' else method}, {precision}"
            shares = [limits[precision, i][method]["seconds"] / steps[i] for i in range(ROUNDS)]
            share = result["summary"]["contenders"][name]["share_of_limit"]
            assert share["median"] == pytest.approx(statistics.median(shares))
            limit = limits[precision, 0][method]
            assert limit["seconds"] == pytest.approx(
                sum(p["seconds"] * p["count"] for p in limit["products"]))


def test_growth_has_every_size_that_the_base_allows(measured):
    series = read(measured[1], "growth")["series"]
    contenders = {"this project, LoRA, bf16", "PEFT, LoRA, bf16 autocast"}
    sizes = {"batch_size": {"4", "8", "16", "32", "64"}, "block_size": {"64", "128"},
             "r": {"1", "4", "16"}}
    assert {axis: {name: set(points) for name, points in names.items()}
            for axis, names in series.items()} == {
        axis: dict.fromkeys(contenders, expected) for axis, expected in sizes.items()}
    batch = series["batch_size"]["this project, LoRA, bf16"]
    assert batch["64"]["seconds"]["median"] > batch["4"]["seconds"]["median"]


@pytest.mark.parametrize("what", ["speed", "growth"])
def test_pictures_are_drawn(measured, what):
    picture = next(measured[1].glob(f"{what}-cpu-*.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("n_inner", [None, 24])
def test_the_products_are_those_of_a_stock_training_step(method, n_inner):
    model = tiny_gpt2(**BASE, n_inner=n_inner, attn_implementation="eager").train()
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=3, target_modules=["c_attn"], lora_dropout=0.05, fan_in_fan_out=True))
    ids = token_ids(317, 5, 32)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    found = speed_products.products(GPT2Config(vocab_size=317, n_inner=n_inner, **BASE), method,
                                    batch_size=5, block_size=32, r=3)
    assert sum(p.flops * count for p, count in found.items()) == counter.get_total_flops()


def test_each_product_is_timed_in_its_shape_and_layout(base):
    for product in speed_products.products(load_config(base), "full", 4, 32, 8):
        a, b, out = product.operands(torch.float32, CPU)
        with FlopCounterMode(display=False) as counter:
            assert (a @ b).shape == out.shape
        assert counter.get_total_flops() == product.flops
        assert (a.is_contiguous(), b.is_contiguous()) == {
            "NT": (True, False), "NN": (True, True), "TN": (False, True)}[product.form]


@pytest.mark.parametrize("change", [
    {"kind": "train"}, {"kind": "train", "method": "full"}, {"kind": "evaluate"},
    {"kind": "generate"}, {"kind": "load"}], ids=str)
def test_both_sides_compute_the_same(base, tmp_path, change):
    task = replace(Task("train", str(base)), **change)
    values = [np.array(CALLS[task.kind][side](replace(task, side=side), CPU, tmp_path)())
              for side in ("ours", "theirs")]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0].shape == ((112,) if task.kind == "generate" else ())


def test_saving_writes_the_same_tensors(base, tmp_path):
    for side in ("ours", "theirs"):
        CALLS["save"][side](Task("save", str(base), side=side), CPU, tmp_path / side)()
    ours, theirs = (peft.load_peft_weights(str(tmp_path / side)) for side in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()} != {}


def test_without_a_base_it_makes_one_of_random_weights(tmp_path):
    with (mock.patch.object(speed_worker, "GPT2Config", lambda: GPT2Config(257, **BASE)),
          mock.patch.object(speed, "run_apart", speed_worker.measure)):
        ending = run(speed.main, "--out", tmp_path, "--device", "cpu", "--only", "evaluate",
                     "--rounds", 1, "--steps", 1)
    assert ending.status == 0, ending.stderr
    result = read(tmp_path, "evaluate")
    assert result["base"] == "GPT-2 124M, random weights" and len(result["measurements"]) == 5


def test_every_measurement_has_a_process_of_its_own(base, tmp_path):
    ending = run(speed.main, "--base", base, "--out", tmp_path, "--device", "cpu", "--only",
                 "evaluate", "--precision", "fp32", "--rounds", 1, "--steps", 2)
    assert ending.status == 0, ending.stderr
    result = read(tmp_path, "evaluate")
    assert [len(r["seconds"]) for r in result["measurements"]] == [2, 2]
    assert len(result["summary"]["ratios"]) == 1


@pytest.mark.parametrize(("script", "reason"), [
    ("kill -9 $$", "its process was ended by SIGKILL (out of memory?)"),
    ("echo 'Traceback' >&2; echo 'KeyError: 1' >&2; exit 1", "KeyError: 1"),
    ("echo 'traceback : SIGABRT' >&2; echo ====== >&2; exit 1", "traceback : SIGABRT"),
    ("exit 3", "exit status 3")])
def test_a_process_that_fails_is_one_line_and_status_1(base, tmp_path, monkeypatch, script, reason):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    ending = run(speed.main, "--base", base, "--out", tmp_path, "--device", "cpu", "--only",
                 "evaluate", "--precision", "fp32", "--rounds", 2)
    assert ending.status == 1
    assert ending.stderr.splitlines() == [
        f"error: {who}, evaluate, fp32: {reason}; left out from here on"
        for who in ("this project", "transformers")]
    assert read(tmp_path, "evaluate")["summary"]["ratios"] == []


def test_the_others_go_on_when_one_contender_fails(base, tmp_path):
    def measure(task):
        if task.name == "PEFT, save, fp32":
            raise RunError("out of memory")
        return speed_worker.measure(task)

    ending = bench(base, tmp_path, "--only", "adapter", measure=measure)
    result = read(tmp_path, "adapter")
    assert ending.status == 1 and len(ending.stderr.splitlines()) == 1
    assert result["failed"] == {"PEFT, save, fp32": "out of memory"}
    assert len(result["measurements"]) == 3 * ROUNDS and len(result["summary"]["ratios"]) == 1


def test_growth_ends_where_the_memory_does(base, tmp_path):
    with (mock.patch.object(speed, "GROWTH", {"batch_size": (1, 2, 4, 8)}),
          mock.patch.object(speed, "free_mb", lambda device: 1.0)):
        ending = bench(base, tmp_path, "--only", "growth")
    assert ending.status == 0, ending.stderr
    growth = read(tmp_path, "growth")
    assert {name: set(points) for name, points in growth["series"]["batch_size"].items()} == {
        "this project, LoRA, bf16": {"1", "2"}, "PEFT, LoRA, bf16 autocast": {"1", "2"}}
    assert set(growth["skipped"]) == {"this project, LoRA, bf16, batch_size 4",
                                      "PEFT, LoRA, bf16 autocast, batch_size 4"}
    assert ending.stdout.count("skipped: ") == 2 and "batch_size 4 and larger" in ending.stdout


def test_compiled_runs_are_left_out_where_there_is_no_compiler(base, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    ending = bench(base, tmp_path, "--only", "adapter", "--compile")
    assert ending.status == 0, ending.stderr
    assert "no no-such-compiler" in ending.stdout


def test_compiled_runs_of_both_sides_are_among_the_tasks(base):
    opts = mock.Mock(directory=base, device="cpu", steps=1, warm_up=1, positions=128,
                     precision=("bf16",), compile=True, only=("train",))
    compiled = [task.name for task in speed.plan(opts) if task.compile]
    assert compiled == [f"{name}, compiled" for name in (
        "this project, LoRA, bf16", "PEFT, LoRA, bf16 autocast", "this project, full, bf16",
        "transformers, full, bf16 autocast")]
