"""`evaluate.py`: a model's scores as JSON, and a table and a picture of finished runs."""

import json
import shutil
from shlex import split

import pytest

import evaluate
from tests.helpers import drawing, tiny_gpt2_directory
from tests.runs import BLOCK, WEIGHTS, one_line, run, scores, stdout_of, story, table, trained
from training.options import BOOK

NOTE = "Compare losses only between a base and the runs below it"


def score(book, tmp_path, *options: object) -> dict:
    """Return the scores of the book's last tenth, the validation part of training."""
    part = ("--text", book, "--val-fraction", 0.1, "--block-size", BLOCK)
    found, said = scores(tmp_path / "scores.json", *part, *options)
    assert f"{book}, the last {100 * found['val_fraction']:.3g} %: " in said
    assert f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}" in said
    return found


def test_the_scores_are_those_that_training_reported(runs, base, book, tmp_path):
    lora = runs["lora"]
    full = runs["full"]
    adapted = score(book, tmp_path, "--base", base, "--adapter", lora.out)
    trained_whole = score(book, tmp_path, "--base", full.out)
    assert (adapted["base"], adapted["adapter"]) == (str(base), str(lora.out))
    assert (trained_whole["base"], trained_whole["adapter"]) == (str(full.out), None)
    fields = "base adapter text val_fraction tokens bytes loss perplexity bits_per_byte accuracy"
    for found, report in ((adapted, lora.report), (trained_whole, full.report)):
        assert set(found) == set(split(fields))
        assert found["text"] == str(book)
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert found[name] == pytest.approx(report[f"best_val_{name}"], rel=1e-6)


def test_a_part_a_whole_text_or_the_default_is_scored(base, book, tmp_path):
    path = tmp_path / "scores.json"
    options = ("--base", base, "--block-size", BLOCK)
    score(book, tmp_path, *options, "--val-fraction", 0.004)  # prints as 0.4 %

    whole, said = scores(path, *options, "--text", book)
    assert said.startswith(f"{book}: ") and whole["val_fraction"] == 1
    assert whole["bytes"] > 0.99 * book.stat().st_size

    strided, _ = scores(path, *options, "--text", book, "--stride", 4)  # more context per token
    assert strided["tokens"] == whole["tokens"] and strided["loss"] != whole["loss"]

    default, _ = scores(path, *options)
    assert default["text"] == str(BOOK) and default["val_fraction"] == 0.1


def test_training_validates_as_evaluation_does_whatever_its_stride(base, book, tmp_path):
    options = ("--stride", 4, "--label-shift", 2, "--max-steps", 1)
    one = trained("lora", base, book, tmp_path / "run", *options)
    found = score(book, tmp_path, "--base", base, "--label-shift", 2)
    assert found["loss"] == pytest.approx(one.report["base_val_loss"], rel=1e-6)


def compare(*directories: object) -> tuple[list[list[str]], str]:
    """Return the table's cells, row by row, and the whole output."""
    said = stdout_of(evaluate.main, "--compare", *directories)
    return table(said), said


@drawing()
def test_the_table_and_the_picture_hold_base_lora_and_full(runs, base, book, tmp_path):
    picture = runs["lora"].out.parent / "compare.png"
    picture.unlink(missing_ok=True)
    (head, _, *rows), printed = compare(runs["lora"].out, runs["full"].out)
    found = score(book, tmp_path, "--base", base)
    of_base = {
        "": f"base ./{base.name}",
        "trained": "0",
        "val loss": f"{found['loss']:.4f}",
        "perplexity": f"{found['perplexity']:.2f}",
    }
    assert rows[0] == [of_base.get(column, "-") for column in head]
    for row, name in zip(rows[1:], WEIGHTS, strict=True):
        r = runs[name].report
        assert dict(zip(head, row, strict=True)) == {
            "": f"{name} ({runs[name].out})",
            "batch": str(r["options"]["batch_size"]),
            "peak lr": f"{r['options']['lr']:g}",
            "steps": str(r["steps"]),
            "trained": f"{r['trainable_parameters']:,}",
            "val loss": f"{r['best_val_loss']:.4f}",
            "perplexity": f"{r['best_val_perplexity']:.2f}",
            "bits/byte": f"{r['best_val_bits_per_byte']:.4f}",
            "seconds": f"{r['seconds']:,.0f}",
            "tokens/s": f"{r['tokens_per_second']:,.0f}",
            "peak MB": f"{r['peak_memory_mb']:,.0f}",
        }
    assert str(picture) in printed
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 10_000


def test_files_beside_the_runs_are_left_out(runs, tmp_path):
    (tmp_path / "compare.png").touch()  # `runs/*` also matches files
    (_, _, *rows), _ = compare(runs["lora"].out, tmp_path / "compare.png")
    assert [row[0] for row in rows] == [rows[0][0], f"lora ({runs['lora'].out})"]


def test_runs_on_a_quantised_base_have_a_row_for_that_base(runs, base, book, tmp_path):
    quantised = ("--quantise", "nf4")
    of_nf4 = trained("lora", base, book, tmp_path / "nf4", *quantised, "--max-steps", 1)
    plain = score(book, tmp_path, "--base", base)
    nf4 = score(book, tmp_path, "--base", base, *quantised)
    expected = {
        f"base ./{base.name}": f"{plain['loss']:.4f}",
        f"base ./{base.name} (nf4)": f"{nf4['loss']:.4f}",
    }
    assert plain["loss"] != nf4["loss"]
    for directories in ((runs["lora"].out, of_nf4.out), (of_nf4.out, runs["lora"].out)):
        (_, _, *rows), printed = compare(*directories)
        assert {row[0]: row[5] for row in rows[::2]} == expected
        assert NOTE in printed


def test_runs_are_told_apart_by_content_and_not_by_path(runs, base, book, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    shutil.copy(book, tmp_path / "book.txt")
    monkeypatch.chdir(tmp_path)

    def train(name: str, *options: object):
        """Train on the base and the book that are at the same two paths at this time."""
        return trained("lora", "base", "book.txt", tmp_path / name, "--max-steps", 1, *options).out

    first = train("first")
    rows, printed = compare(first, runs["lora"].out)  # the same base at two paths
    assert len(rows) == 2 + 3 and NOTE not in printed

    (tmp_path / "book.txt").write_text(story(seed=1))
    book_changed = train("second")
    (_, _, *rows), printed = compare(first, book_changed)
    (_, _, *rows_of_first), _ = compare(first)
    (_, _, *rows_of_second), _ = compare(book_changed)
    assert rows == rows_of_first + rows_of_second and NOTE in printed

    shifted = train("shift", "--label-shift", 2)
    rows, printed = compare(book_changed, shifted)
    assert len(rows) == 2 + 2 + 2 and NOTE in printed

    tiny_gpt2_directory(tmp_path / "base", seed=1)
    base_changed = train("third")
    rows, printed = compare(book_changed, base_changed)
    assert len(rows) == 2 + 2 + 2 and NOTE in printed


def test_a_report_that_is_damaged_or_of_another_version_is_refused(runs, tmp_path):
    directory = shutil.copytree(runs["lora"].out, tmp_path / "run")
    path = directory / "run.json"
    whole = path.read_text()
    path.write_text(whole[:-9])
    line = one_line(run(evaluate.main, "--compare", directory), 2)
    assert f"error: {path}: not valid JSON" in line
    path.write_text(whole.replace('"best_val_loss"', '"renamed"'))
    line = one_line(run(evaluate.main, "--compare", directory), 2)
    assert line == f"error: {path}: has no best_val_loss; train again with --overwrite"
    report = json.loads(whole)
    for field in ("method", "options", "seconds"):
        path.write_text(json.dumps(report | {field: None}))
        line = one_line(run(evaluate.main, "--compare", directory), 2)
        assert line == f"error: {path}: damaged ({field} is None); train again with --overwrite"
    path.write_text(json.dumps(report | {"options": report["options"] | {"batch_size": None}}))
    line = one_line(run(evaluate.main, "--compare", directory), 2)
    assert f"{path}: damaged (batch_size is None)" in line
