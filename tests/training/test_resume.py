"""A stopped and resumed run equals an undisturbed run byte for byte."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from shlex import split
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from common.device import Device
from common.errors import RunError
from tests import runs
from tests.fault.runs import differences, result
from tests.helpers import drawing, tiny_gpt2_directory
from tests.runs import (
    WEIGHTS,
    arguments,
    contents,
    finished,
    one_line,
    refused,
    run,
    run_acting,
    trained,
)
from train import main
from training import meter, saver
from training.checkpoint import CHECKPOINT, read_checkpoint

# Logging, validation and epochs (12 steps) all end at different steps. Dropout is on.
OPTIONS = ("--batch-size", 16, "--max-steps", 18, "--log-every", 5, "--eval-every", 8, "--lr", 3e-3)


@pytest.fixture(scope="module")
def whole(base, book, tmp_path_factory):
    """Return an undisturbed run, by method."""
    return {
        method: trained(method, base, book, tmp_path_factory.mktemp(method), *OPTIONS)
        for method in WEIGHTS
    }


def stop_in_step(number: int, last_step: int, argv: list[str], change=lambda: None):
    """Send the signal in that step, just after `change`. Return the command's ending."""

    def act(moment):
        change()
        signal.raise_signal(number)

    return run_acting({last_step: act}, *argv)


@pytest.fixture(scope="module")
def stopped_run(base, book, tmp_path_factory) -> Path:
    """Return the directory of a run that was stopped in step 9."""
    out = tmp_path_factory.mktemp("stopped")
    argv = arguments("lora", base, book, out, *OPTIONS)
    assert stop_in_step(signal.SIGINT, 9, argv).status == 130
    return out


@pytest.fixture
def stopped(stopped_run, base, book, tmp_path) -> list[str]:
    """Return arguments for a copy of the stopped run, in `tmp_path / "run"`."""
    shutil.copytree(stopped_run, tmp_path / "run")
    return arguments("lora", base, book, tmp_path / "run", *OPTIONS)


@pytest.mark.device
@pytest.mark.parametrize(
    "method, number, step, status",
    [
        ("lora", signal.SIGINT, 3, 130),
        ("lora", signal.SIGTERM, 18, 143),
        ("full", signal.SIGTERM, 13, 143),
    ],
)
def test_a_stopped_run_says_how_to_resume_and_ends_as_if_it_never_stopped(
    whole, base, book, tmp_path, method, number, step, status
):
    argv = arguments(method, base, book, tmp_path, *OPTIONS)
    ending = stop_in_step(number, step, argv)
    assert ending.status == status and not (tmp_path / "run.json").exists()
    assert ending.stderr == (
        f"stopped after step {step}; the same command with --resume continues\n"
    )
    ending = run(main, *argv, "--resume")
    assert ending.status == 0 and f"resuming after step {step} of 18" in ending.stdout
    assert differences(tmp_path, result(whole[method].out)) == []
    speeds = finished(tmp_path).column("tokens_per_second")  # the intervals count every step once
    assert min(speeds) <= finished(tmp_path).report["tokens_per_second"] <= max(speeds)


@pytest.mark.device
def test_in_fp16_a_resumed_run_goes_on_with_the_scale_of_its_loss(
    base, book, tmp_path, monkeypatch
):
    """The scale doubles in each step."""
    growing = partial(torch.amp.GradScaler, growth_interval=1)
    monkeypatch.setattr(torch.amp, "GradScaler", growing)
    argv = arguments(
        "lora", base, book, tmp_path, "--precision", "fp16", "--kernels", "plain", "--max-steps", 3
    )
    assert stop_in_step(signal.SIGINT, 2, argv).status == 130
    scales = []
    act = {3: lambda moment: scales.append(moment.scaler.get_scale())}
    assert run_acting(act, *argv, "--resume").status == 0
    assert scales == [2.0 ** (16 + 2)]


def test_a_run_goes_on_after_its_base_its_book_and_its_directory_were_moved(
    whole, base, book, tmp_path
):
    """The run is stopped twice."""
    old = tmp_path / "old"
    new = tmp_path / "new"
    shutil.copytree(base, old / "base")
    shutil.copy(book, old / "book")
    before = arguments("lora", old / "base", old / "book", old / "run", *OPTIONS)
    after = arguments("lora", new / "base", new / "book", new / "run", *OPTIONS)
    assert stop_in_step(signal.SIGINT, 3, before).status == 130
    old.rename(new)
    assert stop_in_step(signal.SIGTERM, 13, [*after, "--resume"]).status == 143
    assert run(main, *after, "--resume").status == 0
    done = finished(new / "run")
    assert done.report["base"] == "./base" and not old.exists()
    assert contents(done.out)[WEIGHTS["lora"]] == contents(whole["lora"].out)[WEIGHTS["lora"]]
    assert done.column("loss") == whole["lora"].column("loss")


def test_steps_after_the_last_checkpoint_are_run_again(whole, base, book, tmp_path):
    """Resume as after a crash: the metrics are ahead of the checkpoint, and a line is cut."""
    out = tmp_path / "run"
    kept = tmp_path / "kept"
    metrics = out / "metrics.jsonl"
    argv = [*arguments("lora", base, book, out, *OPTIONS), "--checkpoint-every", "6"]
    stop_in_step(signal.SIGINT, 16, argv, lambda: shutil.copy(out / CHECKPOINT, kept))
    assert '"step": 15' in metrics.read_text()
    shutil.copy(kept, out / CHECKPOINT)
    os.truncate(metrics, metrics.stat().st_size - 9)
    assert "resuming after step 12" in run(main, *argv, "--resume").stdout
    assert differences(out, result(whole["lora"].out)) == []  # saves less often


@pytest.mark.parametrize(
    "every, seconds, saved",
    [
        ("2", 0, [0, 0, 2, 2, 4, 4, 6]),
        ("1s", 0.6, [0, 0, 2, 2, 4, 4, 6]),
        ("10m", 4, [0, 0, 0, 3, 3, 3, 6]),  # an epoch has 3 steps
        ("10m", 2, [0, 0, 0, 0, 0, 0, 6]),  # the first run ends too soon to save
    ],
)
def test_a_checkpoint_is_due_by_steps_by_time_and_as_an_epoch_ends(
    base, book, tmp_path, monkeypatch, every, seconds, saved
):
    """The clock advances by `seconds` in each step."""
    seen = []
    clock = runs.Clock()
    for module in (saver, meter):
        monkeypatch.setattr(module, "time", clock)

    def look(moment):
        assert moment.run.plan.steps_per_epoch == 3
        seen.append(read_checkpoint(tmp_path)["progress"]["step"])
        clock.later += seconds

    options = split(f"--batch-size 64 --max-steps 7 --checkpoint-every {every}")
    argv = arguments("lora", base, book, tmp_path, *options)
    ending = run_acting(dict.fromkeys(range(1, 8), look), *argv)
    assert ending.status == 0 and seen == saved
    assert read_checkpoint(tmp_path)["progress"]["step"] == 7


def test_lora_checkpoints_hold_the_adapter_and_no_base_weights(whole):
    state = read_checkpoint(whole["lora"].out)
    assert {name.split("/")[-2] for name in state["parameters"]} == {"lora_A", "lora_B"}
    numbers = sum(t.numel() for t in state["parameters"].values())
    assert numbers == whole["lora"].report["trainable_parameters"]
    lora, full = ((whole[method].out / CHECKPOINT).stat().st_size for method in WEIGHTS)
    assert lora < 3 * 4 * numbers + 40_000 < full


@pytest.mark.parametrize("step", [1, 7, 9])
def test_a_run_killed_before_it_saved_a_step_starts_again(whole, base, book, tmp_path, step):
    """In step 9, there is a best model already. A run on another book is refused."""
    argv = arguments("lora", base, book, tmp_path, *OPTIONS)
    assert run_acting({step: runs.die}, *argv).status == 130
    other = tmp_path.parent / "other.txt"
    other.write_text(runs.story(seed=5))
    assert "--book: the content has changed" in refused(
        tmp_path, *argv, "--book", other, "--resume"
    )
    ending = run(main, *argv, "--resume")
    assert ending.status == 0 and "resuming after step 0 of 18" in ending.stdout
    assert differences(tmp_path, result(whole["lora"].out)) == []


def test_a_best_model_without_a_checkpoint_is_not_replaced(whole, base, book, tmp_path):
    for name in (WEIGHTS["lora"], "metrics.jsonl"):
        shutil.copy(whole["lora"].out / name, tmp_path)
    argv = arguments("lora", base, book, tmp_path, *OPTIONS)
    line = refused(tmp_path, *argv, "--resume")
    assert f"contains {WEIGHTS['lora']} and no checkpoint; --overwrite replaces" in line


def test_a_run_is_not_resumed_as_another(stopped, base, book, tmp_path):
    for option, value in (("--eval-every", "5"), ("--target-modules", "c_fc")):
        line = refused(tmp_path / "run", *stopped, option, value, "--resume")
        assert f"{option} was" in line and value in line
    argv = arguments("full", base, book, tmp_path / "run", *OPTIONS, "--resume")
    assert "the method was lora and is now full" in refused(tmp_path / "run", *argv)


def test_a_run_on_instructions_goes_on_to_the_same_bytes_and_not_on_others(base, tmp_path):
    data = runs.questions(tmp_path / "data.jsonl")
    options = ("--block-size", 64, "--batch-size", 4, "--grad-accum", 2, "--max-steps", 7)
    whole = trained("lora", base, data, tmp_path / "whole", *options)
    argv = arguments("lora", base, data, tmp_path / "run", *options)
    text = data.read_text()
    other = text.replace('completion": "', 'completion": "The ', 1)
    assert stop_in_step(signal.SIGINT, 5, argv, lambda: data.write_text(other)).status == 130
    line = refused(tmp_path / "run", *argv, "--resume")
    assert "--data: the content has changed since the run began" in line
    data.write_text(text)
    argv[argv.index(str(data))] = data.rename(tmp_path / "moved.jsonl")  # the file may have moved
    assert "resuming after step 5 of 7" in run(main, *argv, "--resume").stdout
    assert differences(tmp_path / "run", result(whole.out)) == []


def test_a_run_is_not_resumed_with_other_validation_data(base, tmp_path):
    data, validation = (runs.questions(tmp_path / name) for name in ("data.jsonl", "val.jsonl"))
    argv = arguments("lora", base, data, tmp_path / "run", "--block-size", 64, "--max-steps", 1)
    argv += ["--val-data", str(validation)]
    assert run(main, *argv).status == 0
    validation.write_text(validation.read_text() + validation.read_text())
    line = refused(tmp_path / "run", *argv, "--resume")
    assert "--data or --val-data: the content has changed since the run began" in line


def test_a_run_is_not_resumed_on_a_changed_base(stopped, base, tmp_path):
    other, _ = tiny_gpt2_directory(tmp_path / "other", seed=1, attn_pdrop=0.2)
    for file in ("config.json", "model.safetensors"):
        copy = shutil.copytree(base, tmp_path / file.removesuffix(".json"))
        shutil.copy(other / file, copy / file)
        line = refused(tmp_path / "run", *stopped, "--base", copy, "--resume")
        assert "--base: the content has changed since the run began" in line


def test_a_resume_without_the_best_model_is_refused(stopped, tmp_path):
    """Otherwise the run could complete without a model."""
    path = tmp_path / "run" / WEIGHTS["lora"]
    path.unlink()
    assert str(path) in refused(tmp_path / "run", *stopped, "--resume")


@pytest.mark.parametrize("peaks", [(900.0, 500.0), (500.0, 900.0)])
def test_time_and_peak_memory_are_those_of_all_of_a_runs_processes(
    base, book, tmp_path, monkeypatch, peaks
):
    clock = runs.Clock()
    for module in (saver, meter):
        monkeypatch.setattr(module, "time", clock)
    argv = arguments("lora", base, book, tmp_path, "--max-steps", 4, "--log-every", 4)
    monkeypatch.setattr(Device, "peak_memory_mb", lambda device: peaks[0])
    assert stop_in_step(signal.SIGINT, 2, argv, lambda: vars(clock).update(later=999)).status > 0
    monkeypatch.setattr(Device, "peak_memory_mb", lambda device: peaks[1])
    assert run(main, *argv, "--resume").status == 0
    report = finished(tmp_path).report
    assert report["peak_memory_mb"] == 900 and 999 < report["seconds"] < 1300
    assert report["tokens_per_second"] < 4 * 16 * runs.BLOCK / 999


def test_a_finished_run_says_so_before_it_loads_weights(base, book, tmp_path):
    """Also if the recipe searches the learning rate. A typed rate is another run."""
    options = ("--recipe", "best", "--max-steps", 2)
    trained("lora", base, book, tmp_path / "run", *options)
    argv = arguments("lora", base, book, tmp_path / "run", *options, "--resume")
    with mock.patch.object(train, "load_model", side_effect=AssertionError("weights are read")):
        ending = run(main, *argv)
    assert ending.status == 0 and "this run is finished" in ending.stdout
    book_of_others = tmp_path / "other.txt"
    book_of_others.write_text(runs.story(seed=5))
    assert "--book: the content has changed" in refused(
        tmp_path / "run", *argv, "--book", book_of_others
    )
    line = refused(tmp_path / "run", *argv, "--lr", 1e-3)
    assert "--lr was None and is now 0.001" in line


def test_a_finished_run_says_so_and_is_left_alone(whole, base, book):
    out = whole["lora"].out
    before = contents(out)
    argv = arguments("lora", base, book, out, *OPTIONS, "--resume")
    ending = run(main, *argv, "--log-every", 3, "--checkpoint-every", "5m")
    assert (ending.status, ending.stderr) == (0, "") and contents(out) == before
    assert f"{out}: this run is finished" in ending.stdout
    assert "--lr was 0.003 and is now 0.0001" in refused(out, *argv, "--lr", "1e-4")
    assert "--kernels was fast and is now plain" in refused(out, *argv, "--kernels", "plain")


def test_damaged_metrics_cost_a_resumed_run_its_picture_alone(stopped, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(b"\0" + metrics.read_bytes()[1:])
    with drawing():
        ending = run(main, *stopped, "--resume")
    assert ending.status == 0
    assert ending.stderr.startswith(f"warning: {metrics}: not JSON lines (")
    assert ending.stderr.endswith("loss.png is not drawn\n") and ending.stderr.count("\n") == 1
    assert (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "loss.png").exists()


def test_metrics_that_were_emptied_are_lines_again_after_a_resume(stopped, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert run(main, *stopped, "--resume").status == 0
    assert finished(tmp_path / "run").column("step")[-1] == 18


def test_another_machine_is_warned_of(stopped, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    ending = run(main, *stopped, "--resume")
    assert ending.status == 0
    for change, line in zip(("torch", "threads"), ending.stderr.splitlines(), strict=True):
        assert line.startswith(f"warning: the checkpoint was saved with {change}")


def test_a_resumed_run_that_fails_names_the_checkpoint_from_which_it_began(stopped):
    ending = run_acting({11: fail}, *stopped, "--resume")
    assert one_line(ending, 1) == "error: broken; the last checkpoint is from step 9"


def fail(moment):
    raise RunError("broken")


def test_a_run_from_an_adapter_goes_on_from_this_one_alone(base, book, adapter, tmp_path):
    options = ("--init-adapter", adapter, *OPTIONS, "--max-steps", 4)
    whole = trained("lora", base, book, tmp_path / "whole", *options)
    argv = arguments("lora", base, book, tmp_path / "run", *options)
    assert stop_in_step(signal.SIGINT, 2, argv).status == 130
    adapter.rename(tmp_path / "moved")
    assert str(adapter) in refused(tmp_path / "run", *argv, "--resume")
    argv[argv.index(str(adapter))] = str(tmp_path / "moved")
    other = shutil.copytree(tmp_path / "moved", tmp_path / "other")  # with the same config
    tensors = load_file(other / WEIGHTS["lora"])
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / WEIGHTS["lora"])
    line = refused(tmp_path / "run", *argv, "--resume", "--init-adapter", other)
    assert "--init-adapter: the content has changed since the run began" in line
    assert run(main, *argv, "--resume").status == 0
    assert contents(tmp_path / "run")[WEIGHTS["lora"]] == contents(whole.out)[WEIGHTS["lora"]]
    resumed = finished(tmp_path / "run").report["options"]
    assert (resumed["r"], resumed["init_lora_weights"]) == (4, True)
