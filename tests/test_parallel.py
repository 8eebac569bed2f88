"""Data parallel: real ranks under torchrun compute what one process computes, die and go on."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import scaling
from cli import BOOK
from tests.fault.process import Process, differences, result, start
from tests.helpers import relative_difference
from tests.runs import NO_DROPOUT, arguments, finished, run, trained, trainer
from train import main
from training.randomness import seed_everything

WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
COMPARED = {"lora-2": ("lora", 2), "lora-4": ("lora", 4), "full-2": ("full", 2)}
# 37 divides by no number of ranks, and an epoch's last batch is one window: others' share is none.
SAME = ("--batch-size", 37, "--stride", 11, "--grad-accum", 2, "--max-steps", 18, "--eval-every", 5,
        "--lr", 3e-3)
DROPPING = ("--batch-size", 8, "--max-steps", 16, "--eval-every", 10, "--checkpoint-every", 4,
            "--lr", 3e-3)  # the dropouts are on
KILLED, STOPPED = 7, 12  # at the start of this step
LOST = re.compile(r"error: rank (\d) of 2: the connection to another rank is lost.*")


def torchrun(ranks: int, folder: Path, *command: object) -> Process:
    """Start that many ranks; what they print goes to `folder`."""
    folder.mkdir(exist_ok=True)
    return start([sys.executable, "-m", "torch.distributed.run", "--standalone",
                  "--nproc-per-node", str(ranks), *map(str, command)], folder)


def acting(rank: int, what: str, folder: Path, *argv: object) -> Process:
    """Two ranks, of which this one does what `ranks_worker` says."""
    return torchrun(2, folder, "-m", "tests.ranks_worker", rank, what, *argv)


def errors(process: Process) -> set[str]:
    """The error lines but for those of ranks that only saw another end."""
    lines = (line for line in process.error_lines() if line.startswith("error: "))
    return {line for line in lines if not LOST.fullmatch(line) and line != "error: interrupted"}


def moved(name: str):
    """What a gradient moves of a weight. A key's bias adds the same to all scores of a query: its
    gradient is rounding alone, of which AdamW makes whole steps.
    """
    return (lambda t: t.view(3, -1)[[0, 2]]) if name.endswith("c_attn.bias") else lambda t: t


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(base, book, folder):
    """By name, the runs that nothing happens to, side by side: their imports take longest."""
    started = {name: torchrun(ranks, folder / f"{name}-said", "train.py", *arguments(
        method, base, book, folder / name, *SAME, *NO_DROPOUT[method]))
        for name, (method, ranks) in COMPARED.items()}
    started["whole"] = acting(1, "name:2", folder / "whole-said", *arguments(
        "lora", base, book, folder / "whole", *DROPPING))
    for process in started.values():
        assert process.wait() == 0, process.errors.read_text()
    return started


@pytest.fixture(scope="module")
def alone(base, book, folder):
    """By method, what one process makes of the same."""
    return {method: trained(method, base, book, folder / method, *SAME, *NO_DROPOUT[method])
            for method in WEIGHTS}


@pytest.mark.parametrize("name", COMPARED)
def test_the_number_of_ranks_changes_no_number(ended, alone, base, book, folder, name):
    method, _ = COMPARED[name]
    made = trainer(method, base, book, folder / "unused", *SAME)
    assert len(made.windows) % made.args.batch_size == 1
    ours, expected = finished(folder / name), alone[method]
    assert len(ours.metrics) == 18 and len(ours.column("val_loss")) == 6
    for column in ("step", "epoch", "lr", "loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        assert ours.column(column) == pytest.approx(expected.column(column), rel=1e-5), column
    weights, others = (load_file(r.out / WEIGHTS[method]) for r in (ours, expected))
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        assert relative_difference(*map(moved(key), (tensor, others[key]))) < 1e-4, key


@pytest.mark.parametrize("name", COMPARED)
def test_one_rank_writes_and_speaks(ended, alone, folder, name):
    method, ranks = COMPARED[name]
    ours, expected = finished(folder / name), alone[method]
    assert {p.name for p in ours.out.iterdir()} == {p.name for p in expected.out.iterdir()}
    assert ours.report["device"] == f"{ranks} x cpu" and expected.report["device"] == "cpu"
    said, alone_said = ended[name].log.read_text(), expected.stdout
    assert [line.split()[:2] for line in said.splitlines()] == [
        line.split()[:2] for line in alone_said.splitlines()]
    assert "error" not in ended[name].errors.read_text()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_the_connections_threads_end_with_it(ended):
    """One that is still busy when Python ends would abort it, and torchrun would report a failure
    of a run that is complete.
    """
    lines = [line for line in ended["whole"].error_lines() if line.startswith("threads: ")]
    in_a_step, at_the_end = lines
    assert "gloo" in in_a_step and "gloo" not in at_the_end


def test_each_rank_draws_dropouts_of_its_own(ended, base, book, folder):
    """The first step's loss is that of two halves of its batch under two ranks' seeds, not one."""
    made = trainer("lora", base, book, folder / "unused", *DROPPING)
    after_building = torch.get_rng_state()
    first, second = np.split(next(made.batches(0)), 2)
    made.model.train()

    def loss(windows: np.ndarray) -> float:
        return made.summed_loss(*made.windows.batch(windows)).item()

    of_first = loss(first)
    torch.set_rng_state(after_building)
    same_draws = loss(second)
    seed_everything(made.args.seed + 1)
    own_draws = loss(second)
    tokens = 8 * made.args.block_size
    found = finished(folder / "whole").column("loss")[0]
    assert found == pytest.approx((of_first + own_draws) / tokens, rel=1e-5)
    assert found != pytest.approx((of_first + same_draws) / tokens, rel=1e-4)


@dataclass
class Broken:
    """A run whose rank 1 is killed, which goes on, is stopped, and goes on by what it printed."""

    out: Path
    as_killed: Path  # a copy of `out`
    killed: Process
    stopped: Process
    command: list[str]
    resumed: Process


@pytest.fixture(scope="module")
def broken(base, book, folder):
    out, copy = folder / "broken", folder / "as-killed"
    argv = arguments("lora", base, book, out, *DROPPING)
    killed = acting(1, f"kill:{KILLED}", folder / "killed", *argv)
    killed.wait()
    shutil.copytree(out, copy)
    stopped = acting(1, f"stop:{STOPPED}", folder / "stopped", *argv, "--resume")
    stopped.wait()
    told = stopped.errors.read_text().partition("; go on with: ")[2].splitlines()
    assert told, stopped.errors.read_text()
    command = shlex.split(told[0])
    (folder / "resumed").mkdir()
    resumed = start(command, folder / "resumed")
    resumed.wait()
    return Broken(out, copy, killed, stopped, command, resumed)


def test_a_killed_rank_ends_the_run_which_keeps_its_checkpoint(broken):
    assert broken.killed.popen.returncode != 0
    line, = (line for line in broken.killed.error_lines() if line.startswith("error: "))
    assert LOST.fullmatch(line)[1] == "0" and line.endswith("the last checkpoint is of step 4")
    assert not (broken.as_killed / "run.json").exists()
    assert "resuming after step 4 of 16" in broken.stopped.log.read_text()


def test_sigterm_to_torchrun_saves_and_prints_torchruns_command(broken):
    assert broken.stopped.popen.returncode != 0 and not errors(broken.stopped)
    told = [line for line in broken.stopped.error_lines() if "go on with: " in line]
    assert len(told) == 1 and told[0].startswith(f"stopped after step {STOPPED}; ")
    text = shlex.join(broken.command)
    assert "-m torch.distributed.run --standalone --nproc-per-node 2 train.py lora" in text
    assert text.count("--resume") == 1


def test_a_run_killed_and_stopped_ends_as_if_it_never_had(ended, broken, folder):
    assert broken.resumed.popen.returncode == 0, broken.resumed.errors.read_text()
    assert f"resuming after step {STOPPED} of 16" in broken.resumed.log.read_text()
    assert "warning: the run" not in broken.resumed.errors.read_text()
    assert differences(broken.out, "lora", result(folder / "whole", "lora")) == []


def test_another_number_of_ranks_goes_on_with_a_warning(broken, base, book, tmp_path):
    out = shutil.copytree(broken.as_killed, tmp_path / "run")
    ending = run(main, *arguments("lora", base, book, out, *DROPPING), "--resume")
    assert ending.status == 0 and "resuming after step 4" in ending.stdout
    assert "warning: the run was under ranks 2 and goes on under 1" in ending.stderr
    assert finished(out).column("step") == list(range(1, 17))


@pytest.fixture(scope="module")
def mistaken(base, book, folder):
    """By what was wrong, how two ranks ended."""
    taken, free = folder / "taken", folder / "free"
    taken.mkdir()
    (taken / "run.json").touch()
    started = {
        "base": torchrun(2, folder / "base", "train.py", *arguments(
            "lora", base, book, free, "--base", "gpt9")),
        "out": torchrun(2, folder / "out", "train.py", *arguments("lora", base, book, taken)),
        "differ": acting(1, "--seed 7 --lr 0.1", folder / "differ", *arguments(
            "lora", base, book, free)),
    }
    for process in started.values():
        process.wait()
    return started


@pytest.mark.parametrize("what, words", [
    ("base", "--base 'gpt9': no such directory"), ("out", "holds a run (run.json)"),
    ("differ", "rank 1 and rank 0 differ in options; start every rank with the same options")])
def test_a_mistake_is_one_line_and_no_rank_has_to_be_killed(mistaken, what, words):
    process = mistaken[what]
    line, = errors(process)
    assert words in line and process.popen.returncode != 0
    text = process.errors.read_text()
    assert "SIGKILL" not in text and "train.py\", line" not in text
    assert not (process.log.parent.parent / "free").exists()


def test_the_scaling_benchmark_counts_what_a_step_sends(base, tmp_path):
    ending = run(scaling.main, "--base", base, "--ranks", 2, "--rounds", 1, "--steps", 1,
                 "--device", "cpu", "--out", tmp_path)
    assert ending.status == 0, ending.stderr
    found = json.loads(next(tmp_path.glob("scaling-cpu-*.json")).read_text())
    assert [row["method"] for row in found["summary"]] == list(WEIGHTS)
    for row in found["summary"]:
        made = trainer(row["method"], base, BOOK, tmp_path)
        trainable = sum(p.numel() for p in made.trainable.values())
        # Gradients and loss; whether a checkpoint is due, and whether a signal came.
        assert row["bytes"] == row["ring_bytes"] == 4 * (trainable + 1) + 1 + 8
        assert row["seconds"]["median"] > 0 and row["all_reduce_seconds"]["median"] > 0
        assert f"{row['bytes']:,}" in ending.stdout
    assert str(base) not in json.dumps(found)
