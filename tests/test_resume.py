"""Stopping and going on: a resumed run is the run that nobody stopped, to the byte."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import Ending, Run, arguments, finished, run, story, trained
from train import Trainer, main

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
    step = Trainer.step

    def interrupted(self, batch):
        if self.progress.step + 1 == last_step:
            change()
            signal.raise_signal(number)
        step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        return run(main, *argv)


@pytest.fixture
def stopped(base, book, tmp_path) -> list[str]:
    """The arguments of a run that was stopped in step 3; --out is `tmp_path / "run"`."""
    argv = arguments("lora", base, book, tmp_path / "run", *OPTIONS)
    assert stop_in_step(signal.SIGINT, 3, argv).status == 130
    return argv


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
    assert (python, script) == ("python", "train.py")

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
    """As after a crash: the metrics are ahead of the checkpoint."""
    out = tmp_path / "run"
    argv = arguments("lora", base, book, out, *OPTIONS)
    kept = tmp_path / "checkpoint.pt"

    def keep():
        shutil.copy(out / "checkpoint.pt", kept)

    stop_in_step(signal.SIGINT, 29, [*argv, "--checkpoint-every", "6"], keep)
    assert '"step": 28' in (out / "metrics.jsonl").read_text()
    shutil.copy(kept, out / "checkpoint.pt")
    ending = run(main, *argv, "--checkpoint-every", "6", "--resume")
    assert "resuming after step 24" in ending.stdout
    assert untimed(finished(out))[1] == untimed(whole["lora"])[1]


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


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"{}"])
def test_a_damaged_checkpoint_is_named(stopped, tmp_path, damage):
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    ending = run(main, *stopped, "--resume")
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1
    assert str(checkpoint) in ending.stderr


def test_a_finished_run_says_so_and_is_left_alone(whole, base, book):
    done = whole["lora"]
    before = contents(done.out)
    ending = run(main, *arguments("lora", base, book, done.out, *OPTIONS, "--resume"))
    assert (ending.status, ending.stderr) == (0, "")
    assert "finished" in ending.stdout and str(done.out) in ending.stdout
    assert contents(done.out) == before


def test_overwrite_replaces_everything_that_a_run_left_and_nothing_else(base, book, tmp_path):
    trained("lora", base, book, tmp_path, "--max-steps", 2)
    (tmp_path / "notes.txt").write_text("mine")
    done = trained("full", base, book, tmp_path, "--max-steps", 1, "--overwrite")
    assert set(contents(tmp_path)) == {"notes.txt", "config.json", "model.safetensors", "run.json",
                                       "metrics.jsonl", "loss.png", "checkpoint.pt"}
    assert done.report["method"] == "full" and done.column("step") == [1]


def test_ctrl_c_ends_the_process_with_130_and_no_traceback(base, book, tmp_path):
    command = [sys.executable, "train.py", *arguments("lora", base, book, tmp_path, "--epochs",
                                                      10_000)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130
    assert stderr.startswith("stopped after step") and len(stderr.splitlines()) == 1
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "run.json").exists()
