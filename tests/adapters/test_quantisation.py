"""Each command with `--quantise`: a base in four or eight bits."""

import json
import re
import shutil
import signal

import peft
import pytest
import torch

import evaluate
import train
from adapters import gguf, merge
from adapters.load import load_with_adapter
from lora.quantised import LAYERS, dequantise
from lora.save import WEIGHTS
from lora.tensors import read_metadata
from tests.fault.runs import differences, result
from tests.helpers import relative_difference
from tests.pairs import IDS
from tests.runs import arguments, one_line, run, run_acting, stdout_of, stock_model, trained
from training.checkpoint import CHECKPOINT

STEPS = ("--max-steps", 6, "--lr", 1e-2, "--checkpoint-every", 1)
SAID = "the base is quantised to {}, as in the adapter's training (--quantise)\n"


@pytest.fixture(scope="module")
def runs(base, book, tmp_path_factory):
    """One run on each kind of base."""
    out = {}
    for kind in (*LAYERS, None):
        option = ("--quantise", kind) if kind else ()
        directory = tmp_path_factory.mktemp("run") / str(kind)
        out[kind] = trained("lora", base, book, directory, *STEPS, *option)
    return out


def scores(base, book, *options):
    argv = ("--base", base, "--text", book, "--block-size", 16, "--device", "cpu")
    printed = stdout_of(evaluate.main, *argv, "--val-fraction", 0.1, *options)
    (loss,) = re.findall(r"loss (\d+\.\d+)", printed)
    return float(loss), printed


def test_a_run_names_its_base_and_its_adapter_is_an_ordinary_one(runs, base):
    for kind, done in runs.items():
        assert done.report["options"]["quantise"] == kind
        assert read_metadata(done.out / WEIGHTS).get("base_quantised") == kind
        assert done.report["total_parameters"] == runs[None].report["total_parameters"]
        theirs = peft.PeftModel.from_pretrained(stock_model(base), done.out).eval()
        ours = load_with_adapter(str(base), done.out, quantise="none").model
        with torch.no_grad():
            assert relative_difference(ours(IDS), theirs(IDS).logits) < 1e-5
    names = [sorted(path.name for path in done.out.iterdir()) for done in runs.values()]
    assert names[0] == names[1] == names[2]
    config = json.loads((runs["nf4"].out / "adapter_config.json").read_text())
    assert config == json.loads((runs[None].out / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_base_is_quantised_as_in_training_unless_told_otherwise(
    runs, base, book, kind, tmp_path
):
    done = runs[kind]
    best = done.report["best_val_loss"]
    report = tmp_path / "scores.json"
    loss, printed = scores(base, book, "--adapter", done.out, "--json", report)
    assert json.loads(report.read_text())["quantise"] == kind
    assert printed.startswith(SAID.format(kind))
    assert abs(loss - best) < 1e-4
    assert scores(base, book, "--adapter", done.out, "--quantize", kind) == (
        loss,
        printed.removeprefix(SAID.format(kind)),
    )
    original, printed = scores(
        base, book, "--adapter", done.out, "--quantise", "none", "--json", report
    )
    assert "quantise" not in json.loads(report.read_text())
    assert "quantised" not in printed
    assert original != loss
    base_loss, _ = scores(base, book, "--quantise", kind)
    assert abs(base_loss - done.report["base_val_loss"]) < 1e-4


def test_merging_adds_to_the_dequantised_base(runs, base, book, tmp_path):
    done = runs["nf4"]
    argv = ("--base", base, "--adapter", done.out)
    printed = stdout_of(merge.main, *argv, "--out", tmp_path / "merged")
    assert printed.startswith(SAID.format("nf4"))
    merged, _ = scores(tmp_path / "merged", book)
    assert abs(merged - done.report["best_val_loss"]) < 1e-4
    model = load_with_adapter(str(base), done.out).model
    with pytest.raises(ValueError, match="`dequantise` the model"):
        merge.merge(model)
    expected = model(IDS)
    dequantise(model)
    merge.merge(model)
    assert relative_difference(model(IDS), expected) < 1e-5


def test_a_resumed_run_is_the_run_that_nobody_stopped(runs, base, book, tmp_path):
    argv = arguments("lora", base, book, tmp_path / "run", *STEPS, "--quantise", "nf4")
    ending = run_acting({3: lambda trainer: signal.raise_signal(signal.SIGINT)}, *argv)
    assert ending.status == 130
    sizes = [(out / CHECKPOINT).stat().st_size for out in (tmp_path / "run", runs[None].out)]
    assert abs(sizes[0] - sizes[1]) < 100  # in bytes: the adapter does not contain the base
    for other in ("int8", "none"):
        refused = run(train.main, *argv[:-1], other, "--resume")
        assert "--quantise was nf4 and is now" in one_line(refused, 2)
    assert run(train.main, *argv, "--resume").status == 0
    assert differences(tmp_path / "run", result(runs["nf4"].out)) == []


def test_training_goes_on_with_the_quantised_base(runs, base, book, tmp_path):
    nf4 = runs["nf4"].out
    start = ("--init-adapter", nf4, "--max-steps", 1)
    done = trained("lora", base, book, tmp_path / "run", *start)
    assert SAID.format("nf4") in done.stdout
    assert done.report["base_val_loss"] == runs["nf4"].report["base_val_loss"]
    assert abs(done.report["start_val_loss"] - runs["nf4"].report["best_val_loss"]) < 1e-4
    said = stdout_of(gguf.main, nf4, "--base", base, "--out", tmp_path / "lora.gguf")
    assert "--quantise nf4" in said


def test_what_cannot_be_is_refused_in_one_line(runs, base, book, tmp_path):
    for method, *options in (
        ("lora", "--quantise", "fp4"),
        ("lora", "--quantise", "nf4", "--init-lora-weights", "pissa"),
        ("full", "--quantise", "nf4"),
    ):
        ending = run(train.main, *arguments(method, base, book, tmp_path / "out", *options))
        assert "--quantise" in one_line(ending, 2)
        assert not (tmp_path / "out").exists()

    shutil.copytree(runs["nf4"].out, tmp_path / "odd")
    path = tmp_path / "odd" / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"base_quantised": "nf4"', b'"base_quantised": "fp4"'))
    ending = run(evaluate.main, "--base", base, "--adapter", tmp_path / "odd", "--text", book)
    assert "'fp4', which is unknown" in one_line(ending, 2)
