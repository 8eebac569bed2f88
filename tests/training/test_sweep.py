"""Check `python -m training.sweep`: its runs, continuing, the table, failures, signals."""

import math
import sys
from statistics import mean
from unittest import mock

import pytest

import train
from tests.runs import arguments, contents, die, run, run_acting, table, trained
from training import sweep
from training.options import ROOT

SHORT = ("--max-steps", 4, "--checkpoint-every", 1, "--batch-size", 4)


@pytest.fixture
def children(monkeypatch) -> list:
    """Return the ending of each train.py. They run in this process to save start-up time."""
    endings = []

    def train_here(command):
        assert command[:2] == [sys.executable, str(ROOT / "train.py")]
        endings.append(run(train.main, *command[2:]))
        return mock.Mock(returncode=endings[-1].status)

    monkeypatch.setattr(sweep.subprocess, "run", train_here)
    return endings


def test_a_sweep_goes_on_where_it_was_and_past_a_failure(base, book, tmp_path, children):
    out = tmp_path / "sweep"
    options = (*SHORT, "--lr", 0.01, "--r", 2)
    first, second = "lr=0.01,r=2,seed=1", "lr=0.01,r=2,seed=2"
    alone = [
        trained("lora", base, book, tmp_path / "1", *options, "--seed", 1),
        trained("lora", base, book, tmp_path / "2", *options, "--seed", 2),
    ]
    killed = arguments("lora", base, book, out / first, *options, "--seed", 1)
    run_acting({3: die}, *killed)

    sweep_both = arguments("lora", base, book, out, "--resume", *options, 99, "--seed", 1, 2, 1)
    ending = run(sweep.main, *sweep_both)
    assert [child.status for child in children] == [0, 0, 2, 2] and ending.status == 1
    assert "resuming after step 2 of 4" in children[0].stdout
    assert "error: lr=0.01,r=99,seed=2: exit status 2\n" in ending.stderr
    for name, expected in ((first, alone[0]), (second, alone[1])):
        found = contents(out / name)["adapter_model.safetensors"]
        assert found == contents(expected.out)["adapter_model.safetensors"]

    losses = [r.report["best_val_loss"] for r in alone]
    assert losses[0] != losses[1]
    written = (out / "sweep.md").read_text()
    assert written in ending.stdout
    [_, _, row] = table(written)
    spread = f"{min(losses):.4f} .. {max(losses):.4f}"
    average = mean(losses)
    cells = [f"{average:.4f}", spread, f"{math.exp(average):.2f}"]
    assert row == ["lr 0.01, r 2", "2", *cells]


def test_a_sweep_again_leaves_finished_runs_as_they_are(base, book, tmp_path, children):
    out = tmp_path / "sweep"
    command = arguments("lora", base, book, out, *SHORT, "--lr", 0.01, "--seed", 1)
    assert run(sweep.main, *command).status == 0
    before = contents(out / "lr=0.01,seed=1")
    written = (out / "sweep.md").read_text()

    assert run(sweep.main, *command).status == 0
    assert "nothing to resume" in children[-1].stdout
    assert run(sweep.main, *command, "--epochs", 7).status == 1  # the options of another run
    assert contents(out / "lr=0.01,seed=1") == before
    assert (out / "sweep.md").read_text() == written

    assert run(sweep.main, *command, "--overwrite").status == 0
    assert "resum" not in children[-1].stdout


def test_rates_that_differ_in_the_seventh_digit_have_a_row_each(base, book, tmp_path, children):
    rates = ("--lr", "0.01", "0.010000001")
    ending = run(sweep.main, *arguments("lora", base, book, tmp_path, *SHORT, *rates))
    assert [row[0] for row in table(ending.stdout)[2:]] == ["lr 0.01", "lr 0.010000001"]


def test_an_interrupted_sweep_ends_as_its_run_did(base, book, tmp_path, monkeypatch):
    ended = mock.Mock(returncode=130)
    monkeypatch.setattr(sweep.subprocess, "run", lambda command: ended)
    ending = run(sweep.main, *arguments("lora", base, book, tmp_path / "sweep", "--seed", 1, 2))
    assert ending.status == 130 and ending.stdout.count("---") == 1
    assert ending.stderr == "the same command, without --overwrite, resumes the sweep\n"


def test_a_sweep_of_full_fine_tuning_has_no_rank_and_a_mistake_is_one_line(
    base, book, tmp_path, children
):
    command = arguments("full", base, book, tmp_path / "sweep", *SHORT, "--lr", "1e-3")
    ending = run(sweep.main, *command)
    assert ending.status == 0, ending.stderr
    assert (tmp_path / "sweep" / "lr=0.001,seed=42" / "model.safetensors").exists()
    rank_of_full = (*command, "--r", 4)
    rank_zero = ("lora", *command[1:], "--r", 0)
    for mistake in (rank_of_full, rank_zero):
        wrong = run(sweep.main, *mistake)
        assert (wrong.status, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
