"""A run's files, and its numbers against stock transformers and PEFT."""

import hashlib
import math
from shlex import split
from unittest import mock

import pytest
import torch

import train
from model.gpt2 import GPT2
from tests import runs
from tests.helpers import TINY, drawing
from tests.runs import BLOCK, Run, run, stock_model, stock_result, token_parts, trained, windows
from training import meter, report, saver
from training.options import BOOK

REPORT = """
    method base options trainable_parameters total_parameters trainable_percent
    base_val_loss start_val_loss best_val_loss base_val_perplexity best_val_perplexity
    best_val_bits_per_byte
    lr steps seconds tokens_per_second peak_memory_mb device precision torch
    base_sha256 book_sha256 init_adapter_sha256
"""


@pytest.fixture(params=["lora", "full"])
def done(request, runs) -> Run:
    return runs[request.param]


def test_a_run_leaves_its_files_and_no_others(done):
    if done.report["method"] == "lora":
        weights = "adapter_config.json adapter_model.safetensors"
    else:
        weights = "config.json generation_config.json model.safetensors"
    others = "run.json metrics.jsonl loss.png tokenizer.json tokenizer_config.json"
    checkpoints = "checkpoint.safetensors checkpoint.previous.safetensors"
    names = split(f"{others} {checkpoints} {weights}")
    assert sorted(path.name for path in done.out.iterdir()) == sorted(names)
    picture = (done.out / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000


def test_run_json_tells_the_run(done, base, book):
    report = done.report
    assert set(report) == set(split(REPORT))
    assert ("r" in report["options"]) == (report["method"] == "lora")
    assert report["options"]["book"] == [book.name] and report["options"]["lr"] == 3e-3
    assert done.stdout.startswith(f"trainable params: {report['trainable_parameters']:,} || ")
    assert report["base"] == report["options"]["base"] == f"./{base.name}"
    assert (report["device"], report["precision"]) == ("cpu", "fp32")
    assert report["torch"] == torch.__version__
    hashes = {}
    for name, file in (
        ("config", "config.json"),
        ("weights", "model.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
    ):
        hashes[name] = hashlib.sha256((base / file).read_bytes()).hexdigest()
    assert report["base_sha256"] == hashes
    assert report["book_sha256"] == [hashlib.sha256(book.read_bytes()).hexdigest()]
    assert report["best_val_loss"] == min(done.column("val_loss")) < report["base_val_loss"]
    assert report["best_val_perplexity"] == pytest.approx(math.exp(report["best_val_loss"]))
    assert report["best_val_bits_per_byte"] == min(done.column("val_bits_per_byte"))
    assert 0 < report["seconds"] < 600 and 50 < report["peak_memory_mb"] < 100_000
    speeds = done.column("tokens_per_second")
    assert min(speeds) <= report["tokens_per_second"] <= max(speeds)


def test_each_logged_step_is_a_line_of_metrics(done, book):
    always = ["step", "epoch", "loss", "lr", "grad_norm", "tokens_per_second"]
    validation = ["val_loss", "val_perplexity", "val_bits_per_byte"]
    batch_size = done.report["options"]["batch_size"]
    epoch = math.ceil(len(windows(token_parts(book)[0])[0]) / batch_size)
    assert done.report["steps"] == 2 * epoch  # the steps of the fixture
    assert done.column("step") == list(range(1, 2 * epoch + 1))
    for line in done.metrics:
        validates = line["step"] % 3 == 0 or line["step"] % epoch == 0
        assert sorted(line) == sorted(always + validation * validates)
        assert line["epoch"] == line["step"] / epoch


def test_the_saved_model_has_the_reported_loss_in_stock_libraries(done, base, book):
    for name, model in (("base", stock_model(base)), ("best", stock_result(done))):
        loss = runs.validation_loss(model, token_parts(book)[1])
        assert done.report[f"{name}_val_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "options, logged, validated",
    [
        (("--epochs", 1, "--max-steps", 99), {10, 12}, {12}),
        (("--max-steps", 9, "--log-every", 99, "--eval-every", 4), {4, 8, 9}, {4, 8, 9}),
    ],
)
def test_options_say_when_to_log_to_validate_and_to_end(
    base, book, tmp_path, options, logged, validated
):
    done = trained("lora", base, book, tmp_path, "--batch-size", 15, "--log-every", 10, *options)
    assert set(done.column("step")) == logged
    assert {line["step"] for line in done.metrics if "val_loss" in line} == validated


def test_the_best_model_is_kept_when_validation_gets_worse(base, book, tmp_path):
    options = split("--max-steps 2 --eval-every 1 --lr 1 --warmup-ratio 0.9")
    done = trained("lora", base, book, tmp_path, *options, *runs.NO_DROPOUT["lora"])
    losses = done.column("val_loss")
    assert losses[-1] > min(losses) + 0.1
    kept = runs.validation_loss(stock_result(done), token_parts(book)[1])
    assert kept == pytest.approx(min(losses), rel=1e-5)
    assert done.report["best_val_loss"] == min(losses)


def test_init_adapter_goes_on_where_it_ended_and_is_measured_against_the_base(base, book, tmp_path):
    train_part, val_part = token_parts(book)
    options = split("--epochs 3 --r 4 --lora-alpha 4 --lr 1e-2")
    first = trained("lora", base, book, tmp_path / "first", *options, *runs.NO_DROPOUT["lora"])
    # One step on the whole training part. LoRA's dropout is the dropout of the first run.
    step = ("--init-adapter", first.out, *split("--epochs 1 --batch-size 1000 --base-dropout 0"))
    second = trained("lora", base, book, tmp_path / "second", *step)
    loss = runs.mean_loss(stock_result(first), *windows(train_part)).item()
    assert second.column("loss")[0] == pytest.approx(loss, rel=1e-6)
    assert second.column("loss")[0] < first.column("loss")[0] - 0.01
    assert second.report["base_val_loss"] == first.report["base_val_loss"]
    assert first.report["start_val_loss"] == first.report["base_val_loss"]
    assert second.report["start_val_loss"] == pytest.approx(first.report["best_val_loss"], rel=1e-6)
    assert [second.report["options"][name] for name in ("r", "lora_alpha")] == [4, 4]
    assert second.report["best_val_loss"] == pytest.approx(
        runs.validation_loss(stock_result(second), val_part), rel=1e-6
    )

    # The initial adapter is scored first, and kept if training makes it worse.
    high_rate = split("--lr 10 --warmup-ratio 0 --clip 0")
    figures = []
    keep = mock.patch.object(report, "save_figure", lambda figure, path: figures.append(figure))
    with drawing(), keep:
        worse = trained("lora", base, book, tmp_path / "worse", *step, *high_rate)
    [ring] = [line for line in figures[0].axes[0].lines if line.get_label() == "saved"]
    assert ring.get_xydata().tolist() == [[0, worse.report["best_val_loss"]]]
    torch.testing.assert_close(worse.weights, first.weights, rtol=0, atol=0)
    assert worse.report["best_val_loss"] == pytest.approx(first.report["best_val_loss"], rel=1e-6)
    assert worse.column("val_loss")[-1] > worse.report["best_val_loss"] + 0.1


def test_the_order_of_several_books_is_the_runs_own(book, base, tmp_path):
    other = tmp_path / "another book.txt"
    other.write_text(runs.story(seed=1))
    argv = runs.arguments("lora", base, book, tmp_path / "run", "--max-steps", 1)
    assert run(train.main, *argv, "--book", book, other).status == 0
    again = run(train.main, *argv, "--resume", "--book", other, book)
    assert "--book: the content has changed since" in runs.one_line(again, 2)


def test_full_training_starts_from_gpt2s_own_initialisation_where_there_are_no_weights(
    base, book, tmp_path
):
    (tmp_path / "base").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((base / name).read_bytes())
    done = trained("full", tmp_path / "base", book, tmp_path / "run", "--epochs", 1)
    assert "has no weights" in done.stdout
    # An untrained model with small weights gives all tokens nearly the same probability.
    assert done.report["base_val_loss"] == pytest.approx(math.log(TINY["vocab_size"]), abs=0.1)


def test_what_auto_stands_for_identifies_the_run(base, book, tmp_path):
    done = trained("lora", base, book, tmp_path, "--max-steps", 1, "--precision", "auto")
    assert done.report["options"]["precision"] == done.report["precision"] != "auto"


def test_in_bf16_a_model_has_one_loss_whoever_evaluates_it(base, book, tmp_path):
    """Frozen tables are stored in bf16 and trained tables in fp32, and an evaluation rounds both.
    DoRA computes its norms from A and B in fp32. PiSSA's report is of the adapter as saved.
    """
    options = split("--max-steps 2 --batch-size 8 --precision bf16 --lr 1e-2")
    dora_options = ("--use-dora", "--weight-decay", 0)
    pissa_options = ("--init-lora-weights", "pissa")
    done = {
        "lora": trained("lora", base, book, tmp_path / "lora", *options),
        "full": trained("full", base, book, tmp_path / "full", *options),
        "dora": trained("lora", base, book, tmp_path / "dora", *options, *dora_options),
        "pissa": trained("lora", base, book, tmp_path / "pissa", *options, *pissa_options),
    }
    exact = trained("lora", base, book, tmp_path / "fp32", "--max-steps", 1)
    lora = done["lora"].report
    full = done["full"].report
    assert lora["base_val_loss"] == full["base_val_loss"] != exact.report["base_val_loss"]
    assert lora["base_val_loss"] == done["pissa"].report["base_val_loss"]
    assert full["best_val_loss"] < full["base_val_loss"]
    part = ("--text", book, *split(f"--val-fraction 0.1 --block-size {BLOCK} --precision bf16"))
    for name, one in done.items():
        model = ("--base", base, "--adapter", one.out)
        if name == "full":
            model = ("--base", one.out)
        found, _ = runs.scores(tmp_path / "scores.json", *model, *part)
        close = 1e-6 if name == "pissa" else 1e-9
        assert found["loss"] == pytest.approx(one.report["best_val_loss"], rel=close)


def test_tokens_a_second_are_those_of_the_steps_alone(base, book, tmp_path, monkeypatch):
    """Validation and saving do not count as training time."""
    clock = runs.Clock()

    def slowly(function):
        def slow(*args):
            clock.later += 100
            return function(*args)

        return slow

    for module in (saver, meter):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(train, "validate", slowly(train.validate))
    monkeypatch.setattr(saver, "write_checkpoint", slowly(saver.write_checkpoint))
    options = split("--max-steps 4 --batch-size 2 --eval-every 2 --checkpoint-every 1")
    run = trained("lora", base, book, tmp_path / "run", *options)
    assert clock.later == 800
    assert min(run.column("tokens_per_second")) > 2 * BLOCK / 50


def test_a_text_that_the_base_cannot_read_is_said(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\t" * 1500)
    (tmp_path / "book.txt").write_text(BOOK.read_text()[:12_000])
    options = ("--max-steps", 1, "--block-size", 32, "--batch-size", 1, "--val-fraction", 0.02)
    for text, said in ((tmp_path / "blank.txt", True), (tmp_path / "book.txt", False)):
        argv = runs.arguments("lora", "mini", text, tmp_path / text.stem, *options)
        assert ("worse than by guessing" in run(train.main, *argv).stderr) == said


def test_validation_takes_no_more_windows_at_a_time_than_training(
    base, book, tmp_path, monkeypatch
):
    """A smaller --batch-size helps if validation runs out of memory."""
    seen = []
    token_losses = GPT2.token_losses

    def note(self, idx, targets):
        seen.append(len(idx))
        return token_losses(self, idx, targets)

    monkeypatch.setattr(GPT2, "token_losses", note)
    options = split("--kernels plain --max-steps 1 --batch-size 4 --grad-accum 2")
    trained("lora", base, book, tmp_path, *options)
    assert max(seen) == 2
