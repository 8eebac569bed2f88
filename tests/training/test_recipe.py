"""The recipes: their settings, the user's overriding options, and the fields in `run.json`."""

import json
from collections import Counter
from shlex import split
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import train
from benchmarks.ours import Steps
from benchmarks.reference import METHODS
from common.device import Device
from common.errors import RunError
from common.processes import Processes
from tests import runs
from tests.fault.runs import differences, result
from tests.runs import WEIGHTS, arguments, one_line, run, run_acting, trained
from train import main
from training.options import BOOK, parse_options
from training.plan import make_plan
from training.report import advice
from training.search import short_run_data

ALL_LAYERS = ["c_attn", "c_proj", "c_fc"]
SHORT = ("--max-steps", 1, "--batch-size", 4)
CHOSEN = ("recipe", "lr", "target_modules", "lora_alpha", "r")


def chosen(done):
    return [done.report["options"][name] for name in CHOSEN]


def test_the_searched_rate_gives_the_run_of_the_same_typed_rate(base, book, tmp_path):
    """The search leaves no trace in the weights, the optimizer or the random state."""
    options = ("--recipe", "best", "--batch-size", 4, "--epochs", 1)
    searched = trained("lora", base, book, tmp_path / "searched", *options)
    tried = dict(searched.report["search"])
    best = min(tried, key=tried.get)
    assert {best / 2, best * 2} <= tried.keys() and list(tried) == sorted(tried)
    lr = searched.report["lr"]
    assert best / 2 < lr < best * 2
    assert f"lr {lr:g}, found in" in searched.stdout
    assert searched.report["options"]["lr"] is None

    typed = trained("lora", base, book, tmp_path / "typed", *options, "--lr", lr)
    assert "search" not in typed.report and "found in" not in typed.stdout
    assert typed.column("loss") == searched.column("loss")
    assert (searched.out / WEIGHTS["lora"]).read_bytes() == (
        typed.out / WEIGHTS["lora"]
    ).read_bytes()


def test_the_search_does_not_see_the_validation_part(base, tmp_path):
    data = runs.questions(tmp_path / "data.jsonl")
    lines = data.read_text().splitlines(keepends=True)
    found = []
    for name, some in (("one", lines[:5]), ("two", lines[5:])):
        validation = tmp_path / f"{name}.jsonl"
        validation.write_text("".join(some))
        options = ("--val-data", validation, "--block-size", 64, "--max-steps", 2)
        done = trained("lora", base, data, tmp_path / name, *options)
        found.append((done.report["search"], done.report["base_val_loss"]))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_short_runs_read_a_few_windows_again_if_the_run_reads_all_again(base, tmp_path):
    def distinct(epochs):
        more = ("--recipe", "best", "--epochs", epochs, "--grad-accum", 2)
        options = arguments("lora", base, BOOK, tmp_path, *more)
        plan = make_plan(parse_options("-", options), Device.pick("cpu"), Processes())
        inputs = [ids for batch in short_run_data(plan)[0] for ids, _ in batch.micro_batches]
        assert {len(ids) for ids in inputs} == {1}  # of the 2 windows of a batch
        windows = [tuple(row.tolist()) for row in torch.cat(inputs)]
        assert len(windows) == 48 and set(Counter(windows).values()) == {48 // len(set(windows))}
        return len(set(windows))

    assert [distinct(epochs) for epochs in (1, 3, 100)] == [48, 16, 8]


@pytest.mark.parametrize("step", [None, 5])
def test_a_run_killed_in_its_search_or_after_resumes_as_itself(base, book, tmp_path, step):
    options = ("--recipe", "best", "--batch-size", 4, "--max-steps", 9, "--checkpoint-every", 2)
    whole = trained("lora", base, book, tmp_path / "whole", *options)
    argv = arguments("lora", base, book, tmp_path / "run", *options)
    if step:
        assert run_acting({step: runs.die}, *argv).status == 130
    else:
        with mock.patch.object(train, "find_rate", side_effect=KeyboardInterrupt):
            assert run(main, *argv).status == 130
    ending = run(main, *argv, "--resume")
    assert ending.status == 0 and ("found in" in ending.stdout) == (step is None)
    assert differences(tmp_path / "run", result(whole.out)) == []


def test_an_error_in_a_short_run_ends_the_search(base, book, tmp_path, monkeypatch):
    """Only a loss that is not finite counts as a rate that is too high."""

    def lose_process(*_):
        raise RunError("another process has ended")

    monkeypatch.setattr(train, "evaluate", lose_process)
    argv = arguments("lora", base, book, tmp_path, "--recipe", "best", "--batch-size", 4)
    made = Steps(parse_options("-", argv))
    with pytest.raises(RunError, match="another process has ended"):
        train.search_rate(made.plan, made.trainer)


def test_a_rate_that_is_far_too_high_keeps_the_base_in_full_fine_tuning(base, book, tmp_path):
    done = trained("full", base, book, tmp_path / "run", "--max-steps", 2, "--lr", 10)
    assert done.report["best_val_loss"] == done.report["base_val_loss"] < done.column("val_loss")[0]
    before, after = (load_file(d / WEIGHTS["full"]) for d in (base, done.out))
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_rate_that_is_far_too_high_leaves_the_base_as_it_is(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(BOOK.read_text()[:12_000])
    options = ("--block-size", 32, "--batch-size", 2, "--max-steps", 4, "--lr", 10)
    ending = run(main, *arguments("lora", "mini", book, tmp_path / "run", *options))
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert ending.status == 0 and report["best_val_loss"] == report["base_val_loss"]
    saved = load_file(tmp_path / "run" / WEIGHTS["lora"])
    assert not any(saved[name].any() for name in saved if "lora_B" in name)
    warning = "no validation was better than the base, so the saved adapter changes nothing"
    assert f"{warning}; try --lr 5, or another text" in ending.stderr


@pytest.mark.parametrize(
    "losses, said",
    [
        ([3.0, 3.1, 3.2], "later steps did not help; try --epochs 1, or --lr 0.00015"),
        ([3.2, 3.1, 3.0], "the loss may fall further; try --lr 0.0006, or more --epochs"),
        ([3.2, 3.0, 3.1], "try --lr 0.00015 and --lr 0.0006"),
        ([3.0], "try --lr 0.00015 and --lr 0.0006"),
    ],
)
def test_the_advice_follows_from_the_validations(losses, said):
    report = {"lr": 3e-4, "base_val_loss": 4.0, "best_val_loss": min(losses)}
    options = parse_options("-", ["lora"])
    assert said in advice(options, report, losses)
    assert "--recipe best" in advice(options, report, losses)
    full = parse_options("-", ["full", "--epochs", "1"])
    assert "--recipe" not in advice(full, report, losses)
    assert "--epochs 1" not in advice(full, report, losses)


def test_the_reference_is_the_default_for_a_book_and_the_best_for_data(base, book, tmp_path):
    reference = trained("lora", base, book, tmp_path / "reference", *SHORT)
    assert chosen(reference) == ["reference", 3e-4, ["c_attn"], 16, 8]
    assert "--recipe best trains all layers" in reference.stdout.splitlines()[-1]

    data = runs.questions(tmp_path / "data.jsonl")
    small = ("--batch-size", 4, "--block-size", 64, "--epochs", 1)  # 5 steps
    best = trained("lora", base, data, tmp_path / "best", *small)
    assert chosen(best) == ["best", None, ALL_LAYERS, 16, 8]
    assert "--recipe" not in best.stdout
    assert max(best.column("lr")) == pytest.approx(best.report["lr"])

    argv = ["lora", "--data", "data.jsonl"]
    assert parse_options("-", [*argv, "--recipe", "reference"]).recipe == "reference"
    assert parse_options("-", [*argv, "--init-adapter", "other"]).recipe == "reference"


def test_what_is_typed_overrides_the_recipe(base, book, tmp_path):
    argv = split("--recipe best --lr 5e-3 --target-modules c_attn.q --lora-alpha 4 --r 2")
    done = trained("lora", base, book, tmp_path / "run", *SHORT, *argv)
    assert chosen(done) == ["best", 5e-3, ["c_attn.q"], 4, 2]
    assert "found in" not in done.stdout

    more = ("--init-adapter", done.out, "--recipe", "best")  # the adapter sets layers and alpha
    again = trained("lora", base, book, tmp_path / "again", *SHORT, *more)
    layers = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    assert chosen(again) == ["best", None, layers, 4, 2]


def test_a_run_of_the_best_recipe_resumes_as_itself(base, book, tmp_path):
    argv = arguments("lora", base, book, tmp_path / "run", *SHORT, "--recipe", "best")
    assert run(main, *argv).status == 0
    assert "nothing to resume" in run(main, *argv, "--resume").stdout
    line = one_line(run(main, *argv[:-1], "reference", "--resume"), 2)
    assert "--recipe was best and is now reference; repeat the run's options" in line


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_those_of_the_reference_run(method):
    """They differ in the windows, the precision and clipping."""
    default = vars(parse_options("-", [method]))
    reference = vars(parse_options("-", [method, *split(METHODS[method])]))
    different = {name for name in default if default[name] != reference[name]}
    assert different == {"block_size", "stride", "label_shift", "precision", "clip"}
