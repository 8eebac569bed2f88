"""`evaluate.py`: a model's scores as JSON, and the table and picture of finished runs."""

import json
import math
import shutil
import struct

import pytest

import evaluate
from tests.runs import BLOCK, Run, run, trained


@pytest.fixture(scope="module")
def runs(base, book, tmp_path_factory) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("runs")
    return {method: trained(method, base, book, directory / method, "--max-steps", 4, "--lr", 1e-3)
            for method in ("lora", "full")}


def score(book, tmp_path, *options: object) -> dict:
    """The scores of the book's last tenth, those that training validates on."""
    path = tmp_path / "scores.json"
    ending = run(evaluate.main, "--text", book, "--val-fraction", 0.1, "--block-size", BLOCK,
                 "--device", "cpu", "--json", path, *options)
    assert (ending.status, ending.stderr) == (0, "")
    scores = json.loads(path.read_text())
    assert f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.3f}" in ending.stdout
    return scores


@pytest.mark.parametrize("name", ["base", "lora", "full"])
def test_the_scores_are_those_that_training_reported(runs, base, book, tmp_path, name):
    adapter = runs["lora"].out if name == "lora" else None
    model = runs["full"].out if name == "full" else base
    scores = score(book, tmp_path, "--base", model, *(("--adapter", adapter) if adapter else ()))
    assert set(scores) == {"base", "adapter", "text", "val_fraction", "tokens", "bytes", "loss",
                           "perplexity", "bits_per_byte", "accuracy"}
    assert scores["base"] == str(model) and scores["text"] == str(book)
    assert scores["adapter"] == (str(adapter) if adapter else None)
    report = runs["full" if name == "base" else name].report
    which = "base" if name == "base" else "best"
    assert scores["loss"] == pytest.approx(report[f"{which}_val_loss"], rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    if which == "best":
        assert scores["bits_per_byte"] == pytest.approx(report["best_val_bits_per_byte"], rel=1e-6)


def compare(*directories: object) -> tuple[list[list[str]], str]:
    """The table's cells, row by row, and all that was printed."""
    ending = run(evaluate.main, "--compare", *directories)
    assert (ending.status, ending.stderr) == (0, "")
    lines = [line for line in ending.stdout.splitlines() if line.startswith("|")]
    assert len(set(map(len, lines))) == 1  # the columns line up
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines], ending.stdout


def test_the_table_holds_base_lora_and_full_side_by_side(runs, base, book, tmp_path):
    (head, _, *rows), _ = compare(runs["lora"].out, runs["full"].out)
    assert head == ["", "trainable", "share", "val loss", "perplexity", "bits/byte", "seconds",
                    "tokens/s", "peak MB", "MB on disk"]
    s = score(book, tmp_path, "--base", base)
    expected = [[f"base {base}", "0", "0 %", f"{s['loss']:.4f}", f"{s['perplexity']:.2f}",
                 f"{s['bits_per_byte']:.4f}", *"----"]]
    for name, weights in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        r, megabytes = runs[name].report, (runs[name].out / weights).stat().st_size / 1e6
        expected.append([
            name, f"{r['trainable_parameters']:,}", f"{r['trainable_percent']:.4f} %",
            f"{r['best_val_loss']:.4f}", f"{r['best_val_perplexity']:.2f}",
            f"{r['best_val_bits_per_byte']:.4f}", f"{r['seconds']:,.0f}",
            f"{r['tokens_per_second']:,.0f}", f"{r['peak_memory_mb']:,.0f}", f"{megabytes:,.2f}"])
    assert rows == expected


def test_the_picture_is_drawn_beside_the_first_run(runs):
    picture = runs["full"].out.parent / "compare.png"
    picture.unlink(missing_ok=True)
    _, printed = compare(runs["full"].out, runs["lora"].out)
    assert str(picture) in printed
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 10_000
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 400


@pytest.mark.parametrize("options, noted", [(("--lr", 1e-4), False), (("--label-shift", 2), True)])
def test_runs_that_measure_different_things_are_noted(runs, base, book, tmp_path, options, noted):
    other = trained("lora", base, book, tmp_path / "other", "--max-steps", 1, *options)
    rows, printed = compare(runs["lora"].out, other.out)
    assert len(rows) == 2 + 1 + 2
    assert ("their losses do not compare" in printed) == noted


def changed(run: Run, tmp_path, **fields: object):
    """A copy of the run whose `run.json` says something else."""
    copy = shutil.copytree(run.out, tmp_path / "run")
    (copy / "run.json").write_text(json.dumps(run.report | fields))
    return copy


@pytest.mark.parametrize("fields", [
    {"base": "\x1b[2J"}, {"base": "a\nb"}, {"base": "\ud800"}, {"base": "x" * 9999}, {"base": 3},
    {"method": ["lora"]}, {"options": None}, {"seconds": "1"}, {"seconds": -1.0},
    {"best_val_loss": 0}, {"best_val_loss": 1e-320}, {"best_val_loss": 1e300},
    {"trainable_parameters": 10**18},
])
def test_a_run_of_another_make_is_refused(runs, tmp_path, fields):
    path = changed(runs["lora"], tmp_path, **fields)
    ending = run(evaluate.main, "--compare", path)
    assert (ending.status, ending.stdout) == (2, "")
    assert ending.stderr == (f"error: {path / 'run.json'}: is not what train.py leaves at the end "
                             "of a run\n")
    assert not (tmp_path / "compare.png").exists()


def test_a_name_with_dollar_signs_is_drawn_as_it_is(runs, tmp_path):
    path = changed(runs["lora"], tmp_path, base=r"$\no$")
    compare(path)
    assert (tmp_path / "compare.png").stat().st_size > 1000
