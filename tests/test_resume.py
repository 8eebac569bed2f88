"""Stopping and going on: a resumed run is the run that nobody stopped, to the byte."""

import random
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import tiny_gpt2_directory
from tests.runs import (
    Ending,
    Run,
    arguments,
    contents,
    die,
    finished,
    run,
    run_acting,
    story,
    trained,
)
from train import main
from training.checkpoint import read_checkpoint

WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
# Logging, validation and epochs (23 steps) all end at different steps; dropouts are on.
OPTIONS = ("--batch-size", 8, "--max-steps", 30, "--log-every", 7, "--eval-every", 10, "--lr", 3e-3)


@pytest.fixture(scope="module")
def whole(base, book, tmp_path_factory):
    """By method, the run without a stop."""
    return {method: trained(method, base, book, tmp_path_factory.mktemp(method), *OPTIONS)
            for method in WEIGHTS}


def stop_in_step(number: int, last_step: int, argv: list[str], change=lambda: None) -> Ending:
    """The command, to which the signal comes in that step, just after `change`."""
    def act(trainer):
        change()
        signal.raise_signal(number)

    return run_acting({last_step: act}, *argv)


@pytest.fixture
def stopped(base, book, tmp_path) -> list[str]:
    """The arguments of a run that was stopped in step 3; --out is `tmp_path / "run"`."""
    argv = arguments("lora", base, book, tmp_path / "run", *OPTIONS)
    assert stop_in_step(signal.SIGINT, 3, argv).status == 130
    return argv


def untimed(done: Run) -> tuple[dict, list[dict]]:
    """`run.json` and `metrics.jsonl` without what differs from run to run."""
    timed = {"seconds", "tokens_per_second", "peak_memory_mb", "options"}
    report = {name: value for name, value in done.report.items() if name not in timed}
    report |= {name: value for name, value in done.report["options"].items()
               if name not in ("out", "resume")}
    metrics = [{name: value for name, value in line.items() if name not in timed}
               for line in done.metrics]
    return report, metrics


@pytest.mark.parametrize("method, number, step, status", [
    ("lora", signal.SIGINT, 3, 130),
    ("lora", signal.SIGINT, 26, 130),
    ("lora", signal.SIGTERM, 30, 143),
    ("full", signal.SIGTERM, 10, 143),
])
def test_the_command_that_a_stopped_run_prints_ends_it_as_if_it_never_stopped(
        whole, base, book, tmp_path, method, number, step, status):
    ending = stop_in_step(number, step, arguments(method, base, book, tmp_path, *OPTIONS))
    assert ending.status == status and not (tmp_path / "run.json").exists()
    told, command = ending.stderr.strip().split("; go on with: ")
    assert told == f"stopped after step {step}"
    python, script, *argv = shlex.split(command)
    assert Path(python).absolute() == Path(sys.executable) and script == "train.py"

    ending = run(main, *argv)
    assert ending.status == 0 and f"resuming after step {step} of 30" in ending.stdout
    resumed, expected = finished(tmp_path), whole[method]
    assert untimed(resumed) == untimed(expected)
    assert contents(resumed.out)[WEIGHTS[method]] == contents(expected.out)[WEIGHTS[method]]
    speeds = resumed.column("tokens_per_second")  # of intervals that cover each step once
    assert min(speeds) <= resumed.report["tokens_per_second"] <= max(speeds)


def test_a_run_stopped_twice_is_still_the_same(whole, stopped):
    again = stop_in_step(signal.SIGTERM, 12, [*stopped, "--resume"])
    assert again.status == 143 and again.stderr.count("--resume") == 1
    assert run(main, *stopped, "--resume").status == 0
    resumed = finished(Path(stopped[stopped.index("--out") + 1]))
    assert untimed(resumed) == untimed(whole["lora"])
    assert contents(resumed.out)[WEIGHTS["lora"]] == contents(whole["lora"].out)[WEIGHTS["lora"]]


def test_steps_after_the_last_checkpoint_are_run_again(whole, base, book, tmp_path):
    """As after a crash: the metrics are ahead of the checkpoint, and the last line is torn."""
    out, kept = tmp_path / "run", tmp_path / "checkpoint.pt"
    argv = arguments("lora", base, book, out, *OPTIONS)

    def keep():
        shutil.copy(out / "checkpoint.pt", kept)

    stop_in_step(signal.SIGINT, 29, [*argv, "--checkpoint-every", "6"], keep)
    assert '"step": 28' in (out / "metrics.jsonl").read_text()
    shutil.copy(kept, out / "checkpoint.pt")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 29, "lo')
    ending = run(main, *argv, "--checkpoint-every", "6", "--resume")
    assert "resuming after step 24" in ending.stdout
    assert untimed(finished(out))[1] == untimed(whole["lora"])[1]


def test_metrics_that_were_lost_are_missed_and_the_run_goes_on(stopped, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert stop_in_step(signal.SIGINT, 15, [*stopped, "--resume"]).status == 130
    first, second = metrics.read_text().splitlines(keepends=True)[:2]
    metrics.write_text(first + second[:20])
    ending = run(main, *stopped, "--resume")
    assert ending.status == 0 and ending.stderr.startswith(f"warning: {metrics}")
    assert finished(tmp_path / "run").column("step") == [7, 20, 21, 23, 28, 30]


@pytest.mark.parametrize("every", ["1", "4", "1s"])
def test_saving_changes_nothing(whole, base, book, tmp_path, every):
    done = trained("lora", base, book, tmp_path, *OPTIONS, "--checkpoint-every", every)
    assert untimed(done)[1] == untimed(whole["lora"])[1]
    assert contents(tmp_path)[WEIGHTS["lora"]] == contents(whole["lora"].out)[WEIGHTS["lora"]]


@pytest.mark.parametrize("every, saved", [
    ("3", [None, None, None, 3, 3, 3, 6]), ("1s", [None, None, 2, 2, 4, 4, 6])])
def test_checkpoint_every_counts_steps_or_time(base, book, tmp_path, every, saved):
    seen = []

    def look(trainer):
        path = tmp_path / "checkpoint.pt"
        seen.append(read_checkpoint(tmp_path)[0]["progress"]["step"] if path.exists() else None)
        trainer.saved_at -= 0.6 if every == "1s" else 0  # as if the step before had taken 0.6 s

    ending = run_acting(dict.fromkeys(range(1, 8), look), *arguments(
        "lora", base, book, tmp_path, "--max-steps", 7, "--checkpoint-every", every))
    assert ending.status == 0 and seen == saved


def test_every_generator_goes_on_where_it_stopped(base, book, tmp_path):
    def draws(*argv, stop=None):
        drawn = []

        def draw(trainer):
            drawn.append((random.gauss(), np.random.randn(), torch.rand(()).item()))
            if trainer.progress.step + 1 == stop:
                signal.raise_signal(signal.SIGINT)

        run_acting(dict.fromkeys(range(1, 7), draw), *argv, "--max-steps", 6)
        return drawn

    whole, parts = (arguments("lora", base, book, tmp_path / name) for name in ("whole", "parts"))
    expected = draws(*whole)
    assert draws(*parts, stop=3) + draws(*parts, "--resume") == expected
    assert len(set(expected)) == 6


def test_lora_checkpoints_hold_the_adapter_and_no_base_weights(whole):
    state, _ = read_checkpoint(whole["lora"].out)
    assert {name.split(".")[-2] for name in state["parameters"]} == {"lora_A", "lora_B"}
    numbers = sum(t.numel() for t in state["parameters"].values())
    assert numbers == whole["lora"].report["trainable_parameters"]
    size = (whole["lora"].out / "checkpoint.pt").stat().st_size
    assert size < 3 * 4 * numbers + 40_000 < (whole["full"].out / "checkpoint.pt").stat().st_size


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_any_options(
        whole, base, book, tmp_path):
    argv = arguments("lora", base, book, tmp_path, *OPTIONS)
    assert run_acting({9: die}, *argv, "--lr", 1).status == 130
    assert '"step": 7' in (tmp_path / "metrics.jsonl").read_text()
    ending = run(main, *argv, "--resume")
    assert ending.status == 0 and "no checkpoint yet; starting from the beginning" in ending.stdout
    assert untimed(finished(tmp_path)) == untimed(whole["lora"])


def test_a_run_killed_before_its_first_step_is_begun_again_by_the_same_command(
        whole, base, book, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert untimed(trained("lora", base, book, tmp_path, *OPTIONS)) == untimed(whole["lora"])


@pytest.mark.parametrize("option, value", [
    ("--lr", "1e-4"), ("--r", "4"), ("--batch-size", "9"), ("--seed", "1"), ("--max-steps", "31"),
    ("--grad-accum", "2"), ("--target-modules", "c_fc"), ("--precision", "bf16"),
    ("--lora-dropout", "0"), ("--label-shift", "2"), ("--eval-every", "5"),
])
def test_a_run_is_not_resumed_as_another(stopped, tmp_path, option, value):
    before = contents(tmp_path / "run")
    ending = run(main, *stopped, option, value, "--resume")
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1
    assert f"{option} was" in ending.stderr and value.replace("1e-4", "0.0001") in ending.stderr
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("when", ["after the stop", "during the run"])
def test_a_run_is_not_resumed_on_a_changed_book(base, tmp_path, when):
    book = tmp_path / "book.txt"
    book.write_text(story())

    def change():
        book.write_text(story(seed=1))

    argv = arguments("lora", base, book, tmp_path / "run", *OPTIONS)
    during = when == "during the run"
    assert stop_in_step(signal.SIGINT, 3, argv, *([change] if during else [])).status == 130
    change()
    ending = run(main, *argv, "--resume")
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1
    assert f"{book} has changed" in ending.stderr


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_run_is_not_resumed_on_a_changed_base(base, book, tmp_path, file):
    shutil.copytree(base, tmp_path / "base")
    argv = arguments("lora", tmp_path / "base", book, tmp_path / "run", *OPTIONS)
    assert stop_in_step(signal.SIGINT, 3, argv).status == 130
    other, _ = tiny_gpt2_directory(tmp_path / "other", seed=1, attn_pdrop=0.2)
    shutil.copy(other / file, tmp_path / "base" / file)
    before = contents(tmp_path / "run")
    ending = run(main, *argv, "--resume")
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1
    assert f"--base {tmp_path / 'base'}: its {file} has changed" in ending.stderr
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("options, word", [
    ((), None), (("--log-every", 3, "--checkpoint-every", "5m"), None),
    (("--lr", "1e-4"), "--lr was 0.003"), (("--seed", "1"), "--seed"),
])
def test_a_finished_run_says_so_and_is_left_alone(whole, base, book, options, word):
    done = whole["lora"]
    before = contents(done.out)
    argv = arguments("lora", base, book, done.out, *OPTIONS, *options, "--resume")
    ending = run(main, *argv)
    if word:
        assert ending.status == 2 and word in ending.stderr
    else:
        assert (ending.status, ending.stderr) == (0, "")
        assert "finished" in ending.stdout and str(done.out) in ending.stdout
    assert contents(done.out) == before


@pytest.mark.parametrize("change", ["threads", "torch"])
def test_another_machine_is_warned_of(stopped, monkeypatch, change):
    if change == "threads":
        threads = torch.get_num_threads()
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    else:
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    ending = run(main, *stopped, "--resume")
    assert ending.status == 0 and len(ending.stderr.splitlines()) == 1
    assert ending.stderr.startswith(f"warning: the run was under {change} ")


def test_overwrite_replaces_everything_that_a_run_left_and_nothing_else(base, book, tmp_path):
    trained("lora", base, book, tmp_path, "--max-steps", 2)
    (tmp_path / "notes.txt").write_text("mine")
    done = trained("full", base, book, tmp_path, "--max-steps", 1, "--overwrite")
    assert set(contents(tmp_path)) == {"notes.txt", "config.json", "model.safetensors", "run.json",
                                       "metrics.jsonl", "loss.png", "checkpoint.pt"}
    assert done.report["method"] == "full" and done.column("step") == [1]
