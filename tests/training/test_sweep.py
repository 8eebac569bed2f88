"""`python -m training.sweep`: each run as it is alone, going on, the table, failures."""

import signal
from statistics import mean
from unittest import mock

import pytest

import train
from tests.runs import arguments, contents, die, run, run_acting, trained
from training import sweep

SHORT = ("--max-steps", 4, "--checkpoint-every", 1)


@pytest.fixture
def children(monkeypatch) -> list:
    """Return how each train.py ended; they run in this process, which saves their start."""
    endings = []

    class Child:
        def __init__(self, command):
            endings.append(run(train.main, *command[2:]))

        def wait(self) -> int:
            return endings[-1].status

    monkeypatch.setattr(sweep.subprocess, "Popen", Child)
    return endings


def test_a_sweep_goes_on_where_it_was_and_past_a_failure(base, book, tmp_path, children):
    out, rate = tmp_path / "sweep", ("--lr", 0.01)
    names = [f"lr=0.01,r=2,seed={seed}" for seed in (1, 2)]
    alone = [
        trained("lora", base, book, tmp_path / str(seed), *SHORT, *rate, "--r", 2, "--seed", seed)
        for seed in (1, 2)
    ]
    run_acting(
        {3: die},
        *arguments("lora", base, book, out / names[0], *SHORT, *rate, "--r", 2, "--seed", 1),
    )
    command = arguments(
        "lora", base, book, out, *SHORT, "--resume", *rate, "--r", 2, 99, "--seed", 1, 2, 1
    )
    ending = run(sweep.main, *command)
    assert [child.status for child in children] == [0, 0, 2, 2] and ending.status == 1
    assert "resuming after step 2 of 4" in children[0].stdout
    assert "error: lr=0.01,r=99,seed=2: exit status 2\n" in ending.stderr
    for name, expected in zip(names, alone, strict=True):
        found = contents(out / name)["adapter_model.safetensors"]
        assert found == contents(expected.out)["adapter_model.safetensors"]
    losses = [r.report["best_val_loss"] for r in alone]
    assert losses[0] != losses[1]
    table = (out / "sweep.md").read_text()
    assert table in ending.stdout and len(table.splitlines()) == 3
    row = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert row[:4] == [
        "lr 0.01, r 2",
        "2",
        f"{mean(losses):.4f}",
        f"{min(losses):.4f} .. {max(losses):.4f}",
    ]
    assert (out / "sweep.png").stat().st_size > 10_000
    before = contents(out / names[0])
    assert run(sweep.main, *command[:-5], "--seed", 1, 2).status == 0
    assert all("nothing to resume" in child.stdout for child in children[-2:])
    assert run(sweep.main, *command[:-5], "--seed", 1, "--epochs", 7).status == 1
    assert contents(out / names[0]) == before and (out / "sweep.md").read_text() == table
    assert run(sweep.main, *command[:-5], "--seed", 1, "--overwrite").status == 0
    assert "resum" not in children[-1].stdout


@pytest.mark.parametrize("status", [130, 143])
def test_an_interrupted_sweep_ends_as_its_run_did(base, book, tmp_path, monkeypatch, status):
    monkeypatch.setattr(sweep, "train", lambda arguments, out: status)
    ending = run(sweep.main, *arguments("lora", base, book, tmp_path / "sweep", "--seed", 1, 2))
    assert ending.status == status and ending.stdout.count("---") == 1
    assert ending.stderr == "the same command, without --overwrite, resumes the sweep\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_sweep_even_if_the_run_was_done(number, tmp_path, monkeypatch):
    child, before = mock.Mock(), signal.getsignal(number)
    child.wait.side_effect = lambda: signal.raise_signal(number) or 0
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command: child)
    assert sweep.train([], tmp_path) == 128 + number
    assert child.terminate.call_count == (number == signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_the_command_runs_train_py(base, book, tmp_path):
    command = arguments("full", base, book, tmp_path / "sweep", *SHORT, "--lr", "1e-3")
    ending = run(sweep.main, *command)
    assert ending.status == 0, ending.stderr
    assert (tmp_path / "sweep" / "lr=0.001,seed=42" / "model.safetensors").exists()
    for mistake in (*command, "--r", 4), ("lora", *command[1:], "--r", 0):
        wrong = run(sweep.main, *mistake)
        assert (wrong.status, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
