"""The reference run, repeated: its protocol and measure against the reference's own loop."""

import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.pseudo_latin import pseudo_latin
from benchmarks.reference_protocol import METHODS
from cli import BOOK
from tests.helpers import TINY, tiny_gpt2_directory
from tests.runs import Ending, finished, run, stock_model, stock_result, token_parts, trainer

BATCH_SIZE = {"base": 16, "lora": 16, "full": 64}
WORDS, STEPS = 330, 3


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A tiny base that sees the protocol's 128 tokens."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("wide"), n_positions=128, n_embd=16,
                               n_head=2, n_layer=1)[0]


def repeat(base: Path, folder: Path, *options: object) -> Ending:
    return run(reference.main, "--base", base, "--out", folder / "runs", "--device", "cpu",
               "--json", folder / "figures.json", "--words", WORDS, "--max-steps", STEPS, *options)


@dataclass
class Repeated:
    base: Path
    folder: Path
    stdout: str
    figures: dict

    @property
    def book(self) -> Path:
        return next((self.folder / "runs").glob("*.txt"))

    def stock(self, method: str) -> nn.Module:
        """The base or what a run left, in transformers and PEFT."""
        if method == "base":
            return stock_model(self.base)
        return stock_result(finished(self.folder / "runs" / method)).eval()


@pytest.fixture(scope="module")
def repeated(wide_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    ending = repeat(wide_base, folder)
    assert ending.status == 0, ending.stderr
    return Repeated(wide_base, folder, ending.stdout,
                    json.loads((folder / "figures.json").read_text()))


def reference_windows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the reference's dataset returns, x and y (N, 128)."""
    starts = range(len(ids) - 128)
    return (torch.stack([ids[i : i + 128] for i in starts]),
            torch.stack([ids[i + 1 : i + 129] for i in starts]))


@torch.no_grad()
def reference_validation(model: nn.Module, ids: Tensor, batch_size: int) -> float:
    """The reference's validation loop, on its own library."""
    batches = zip(*(t.split(batch_size) for t in reference_windows(ids)), strict=True)
    return float(np.mean([model(input_ids=x, labels=y).loss.item() for x, y in batches]))


@torch.no_grad()
def next_token_loss(model: nn.Module, ids: Tensor) -> float:
    """Each token but the first once, in windows of 128."""
    total = sum(F.cross_entropy(model(ids[None, i : i + 128][:, : len(ids) - i - 1]).logits[0],
                                ids[i + 1 : i + 129], reduction="sum").item()
                for i in range(0, len(ids) - 1, 128))
    return total / (len(ids) - 1)


@pytest.mark.parametrize("method", ["base", "lora", "full"])
def test_the_reference_s_loop_on_its_own_library_measures_the_same(repeated, method):
    ids = token_parts(repeated.book)[1]
    assert (len(ids) - 128) % BATCH_SIZE[method]  # the mean of batches is not that of windows
    model, here = repeated.stock(method), repeated.figures["here"][method]
    expected = reference_validation(model, ids, BATCH_SIZE[method])
    assert here["reference_loss"] == pytest.approx(expected, rel=1e-5)
    assert here["reference_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert f"{here['reference_perplexity']:.4f}" in repeated.stdout
    assert here["next_token"]["loss"] == pytest.approx(next_token_loss(model, ids), rel=1e-5)
    assert here["next_token"]["loss"] != pytest.approx(expected, rel=1e-3)


def test_training_minimises_the_reference_s_loss_on_the_reference_s_windows(repeated):
    made = trainer("lora", repeated.base, repeated.book, repeated.folder / "unused",
                   "--block-size", 128, *METHODS["lora"])
    made.model.eval()
    x, y = reference_windows(token_parts(repeated.book)[0])
    assert len(made.windows) == len(x)
    inputs, targets = made.windows.batch(np.arange(len(x)))
    ours = made.summed_loss(inputs, targets) / targets.numel()
    theirs = stock_model(repeated.base)(input_ids=x, labels=y).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize(("method", "batch_size", "lr"), [("lora", 16, 3e-4), ("full", 64, 3e-5)])
def test_the_runs_have_the_reference_s_options(repeated, method, batch_size, lr):
    options = finished(repeated.folder / "runs" / method).report["options"]
    expected = {"epochs": 3, "stride": 1, "label_shift": 2, "val_fraction": 0.1, "clip": 0,
                "weight_decay": 0.01, "warmup_ratio": 0.06, "precision": "fp32",
                "base_dropout": None, "batch_size": batch_size, "lr": lr}
    if method == "lora":
        expected |= {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["c_attn"]}
    assert {name: options[name] for name in expected} == expected


def test_the_table_has_the_published_figures_and_ours_and_how_long_comes_first(repeated):
    assert repeated.stdout.index(" in all\n") < repeated.stdout.index("base: val")
    rows = {cells[0]: cells[1:] for line in repeated.stdout.splitlines() if line.startswith("| ")
            for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}
    assert rows["lora, published"][:4] == ["294,912", "0.2364 %", "0.2261", "1.2537"]
    assert rows["full, published"][:4] == ["about 124.7 million", "-", "-", "1.1211"]
    trainable, total = peft_counts(repeated)
    assert rows["lora, here"][:2] == [f"{trainable:,}", f"{100 * trainable / total:.4f} %"]
    assert rows["full, here"][:2] == [f"{total - trainable:,}", "100.0000 %"]
    assert f"--max-steps {STEPS}: not the whole run" in repeated.stdout


def peft_counts(repeated: Repeated) -> tuple[int, int]:
    config = peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True)
    base = transformers.GPT2LMHeadModel.from_pretrained(repeated.base)
    return peft.get_peft_model(base, config).get_nb_trainable_parameters()


def test_finished_runs_are_scored_again_on_fewer_windows_and_it_says_so(repeated):
    kept = (repeated.folder / "runs" / "lora" / "adapter_model.safetensors").stat().st_mtime_ns
    ending = repeat(repeated.base, repeated.folder, "--resume", "--val-windows", 20,
                    "--json", repeated.folder / "again.json")
    assert ending.status == 0, ending.stderr
    figures = json.loads((repeated.folder / "again.json").read_text())
    assert figures["val_windows"] == {"scored": 20, "all": len(token_parts(repeated.book)[1]) - 128}
    assert f"on only 20 of the {figures['val_windows']['all']} validation windows" in ending.stdout
    assert "on all" in repeated.stdout
    before, again = (f["here"]["lora"] for f in (repeated.figures, figures))
    assert again["next_token"] == before["next_token"]
    assert again["reference_loss"] == pytest.approx(before["reference_loss"], rel=0.02)
    assert again["reference_loss"] != before["reference_loss"]
    weights = repeated.folder / "runs" / "lora" / "adapter_model.safetensors"
    assert weights.stat().st_mtime_ns == kept


@pytest.mark.parametrize(("options", "words"), [
    ((), ["--overwrite"]),
    (("--resume", "--max-steps", STEPS + 1), ["--max-steps", f"was {STEPS}"]),
    (("--resume", "--words", WORDS + 90), ["--book"]),
])
def test_runs_are_not_lost_or_taken_for_others(repeated, options, words):
    ending = repeat(repeated.base, repeated.folder, *options)
    assert ending.status == 2 and "in all" not in ending.stdout
    assert len(ending.stderr.splitlines()) == 1
    assert all(word in ending.stderr for word in words)


def test_the_figures_hold_no_path(repeated):
    text = (repeated.folder / "figures.json").read_text()
    assert repeated.figures["base"] == repeated.base.name
    assert str(repeated.folder.parent) not in text and str(BOOK.parent) not in text


def test_a_base_that_sees_less_than_a_window_is_refused(base, tmp_path):
    ending = repeat(base, tmp_path)
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1
    assert f"--base {base}" in ending.stderr and str(TINY["n_positions"]) in ending.stderr
    assert not list(tmp_path.iterdir())


def test_a_book_shorter_than_a_window_is_refused(wide_base, tmp_path):
    (tmp_path / "short.txt").write_text("Three words only.")
    ending = repeat(wide_base, tmp_path, "--book", tmp_path / "short.txt")
    assert ending.status == 2 and len(ending.stderr.splitlines()) == 1
    assert str(tmp_path / "short.txt") in ending.stderr


def test_the_made_text_is_the_seed_s_and_repeats_itself():
    text, other = pseudo_latin(3000, 7), pseudo_latin(3000, 8)
    assert text == pseudo_latin(3000, 7)
    sentences, others = (set(re.split(r"\.\s", t)[:-1]) for t in (text, other))
    assert len(sentences) < 30 and not sentences & others
    assert 3000 <= len(text.split()) < 3015
    assert 3 * compressed(text) < compressed(BOOK.read_text()[: len(text)])


def compressed(text: str) -> int:
    return len(zlib.compress(text.encode(), 9))


def test_make_text_writes_the_text_and_replaces_nothing(tmp_path):
    path = tmp_path / "latin.txt"
    make = ("--make-text", path, "--words", 200, "--seed", 7)
    assert run(reference.main, *make).status == 0
    assert path.read_text() == pseudo_latin(200, 7)
    path.write_text("mine")
    ending = run(reference.main, *make)
    assert ending.status == 2 and "--overwrite" in ending.stderr and path.read_text() == "mine"
    assert run(reference.main, *make, "--overwrite").status == 0
    assert path.read_text() == pseudo_latin(200, 7)


@pytest.fixture(scope="module")
def demonstrated(wide_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("demonstration") / "figures.json"
    ending = run(reference.main, "--base", wide_base, "--device", "cpu", "--json", path,
                 "--demonstrate", "--words", 600, "--max-steps", 30)
    assert ending.status == 0, ending.stderr
    return ending.stdout, json.loads(path.read_text())


def test_each_label_makes_its_own_measure_better_and_the_other_worse(demonstrated):
    labels = demonstrated[1]["labels"]
    base, after_next, next_token = labels.values()
    assert after_next["label_shift_2"]["loss"] < base["label_shift_2"]["loss"]
    assert after_next["label_shift_2"]["loss"] < next_token["label_shift_2"]["loss"]
    assert next_token["label_shift_1"]["loss"] < base["label_shift_1"]["loss"]
    assert next_token["label_shift_1"]["loss"] < after_next["label_shift_1"]["loss"]


def test_what_the_texts_are_is_counted_right(demonstrated, tmp_path):
    stdout, figures = demonstrated
    (tmp_path / "latin.txt").write_text(pseudo_latin(600, 42))
    latin, epochs, book = (figures["texts"][i] for i in (0, 2, 3))
    for row, path in ((latin, tmp_path / "latin.txt"), (book, BOOK)):
        train_ids, val_ids = token_parts(path)
        known = {tuple(run) for run in train_ids.unfold(0, 16, 1).tolist()}
        seen = [tuple(run) in known for run in val_ids.unfold(0, 16, 1).tolist()]
        assert row["seen_before"] == pytest.approx(np.mean(seen)) and row["steps"] == 30
        assert row["passes"] == pytest.approx(30 * 4 * 127 / len(train_ids))
    assert latin["seen_before"] > 0.5 > 0.1 > book["seen_before"]
    assert 0 < epochs["steps"] < 30 and epochs["passes"] == pytest.approx(3, rel=0.4)
    assert all(f"{math.exp(row['loss']):.3f}" in stdout for row in figures["texts"])


def test_the_demonstration_shows_what_each_model_writes(demonstrated):
    stdout, figures = demonstrated
    samples = figures["samples"]
    assert samples["prompt"] + " " + samples["the text itself"] in pseudo_latin(600, 42)
    assert samples.keys() == {"prompt", "the text itself", *figures["labels"]}
    assert all(sample in stdout for sample in samples.values())
