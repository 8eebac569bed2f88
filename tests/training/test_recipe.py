"""The recipes: their settings, the user's overriding options, and the fields in `run.json`."""

import json
from argparse import Namespace
from shlex import split
from statistics import mean

import numpy as np
import pytest

from benchmarks.reference import METHODS
from tests import runs
from tests.runs import arguments, one_line, run, trained
from train import main
from training import sweep
from training.options import ROOT, parse_options
from training.recipe import best_rate, rate_factor

ALL_LAYERS = ["c_attn", "c_proj", "c_fc"]
SHORT = ("--max-steps", 1, "--batch-size", 4)
CHOSEN = ("recipe", "lr", "target_modules", "lora_alpha", "r")


def chosen(done):
    return [done.report["options"][name] for name in CHOSEN]


@pytest.mark.parametrize("options", ["--epochs 5", "--epochs 9 --stride 4 --max-steps 150"])
def test_the_rate_follows_the_steps_and_how_often_a_token_is_read(base, book, tmp_path, options):
    argv = ("--batch-size", 4, "--recipe", "best", *split(options))
    made = runs.trainer("lora", base, book, tmp_path, *argv)
    reads = np.zeros(len(made.data.training.tokens))
    steps = 0
    for batch in made.batches():
        steps += 1
        for start in batch.indices * made.options.stride:
            reads[start : start + made.options.block_size] += 1
    rate = 0.035 / np.cbrt(steps * reads.mean() ** 2)
    assert 5e-4 < rate < 8e-3
    assert made.options.lr == pytest.approx(rate, rel=0.02)  # rounded to two digits


def test_the_best_rate_is_within_the_measured_ones():
    few = {(2, 0.1): 8e-3, (60, 1.4): 7.1e-3, (249, 24): 6.7e-4, (5000, 24): 5e-4}
    assert {key: best_rate(*key) for key in few} == few


def test_slices_and_longer_names_of_one_layer_are_one_layer():
    def factor(targets):
        options = ["--recipe", "best", "--target-modules", *split(targets)]
        return rate_factor(parse_options("-", ["lora", *options]))

    for one in ("c_attn.q c_attn.v", "c_attn attn.c_attn", "h.0.mlp.c_proj mlp.c_proj"):
        assert factor(one) == factor("c_fc") == 2
    for several in ("c_proj", "attn.c_proj mlp.c_proj", "c_attn.q c_fc"):
        assert factor(several) == 1


def test_the_reference_is_the_default_for_a_book_and_the_best_for_data(base, book, tmp_path):
    reference = trained("lora", base, book, tmp_path / "reference", *SHORT)
    assert chosen(reference) == ["reference", 3e-4, ["c_attn"], 16, 8]
    assert "--recipe best" in reference.stdout.splitlines()[-1]

    data = runs.questions(tmp_path / "data.jsonl")
    small = ("--batch-size", 4, "--block-size", 64, "--epochs", 1)  # 5 steps, 1 pass
    best = trained("lora", base, data, tmp_path / "best", *small)
    assert chosen(best) == ["best", 8e-3, ALL_LAYERS, 16, 8]
    assert "recipe best: lr 0.008, layers c_attn c_proj c_fc, alpha 16, batch 4;" in best.stdout
    assert "--recipe" not in best.stdout
    assert max(best.column("lr")) == pytest.approx(8e-3)

    argv = ["lora", "--data", "data.jsonl"]
    assert parse_options("-", [*argv, "--recipe", "reference"]).recipe == "reference"
    assert parse_options("-", [*argv, "--init-adapter", "other"]).recipe == "reference"


def test_what_is_typed_overrides_the_recipe(base, book, tmp_path):
    argv = split("--recipe best --lr 5e-3 --target-modules c_attn.q --lora-alpha 4 --r 2")
    done = trained("lora", base, book, tmp_path / "run", *SHORT, *argv)
    assert chosen(done) == ["best", 5e-3, ["c_attn.q"], 4, 2]
    assert "recipe best: lr 0.005, layers c_attn.q, alpha 4, batch 4;" in done.stdout

    more = ("--init-adapter", done.out, "--recipe", "best")  # the adapter sets layers and alpha
    again = trained("lora", base, book, tmp_path / "again", *SHORT, *more)
    layers = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    assert chosen(again) == ["best", 1.6e-2, layers, 4, 2]


def test_a_run_of_the_best_recipe_resumes_as_itself(base, book, tmp_path):
    argv = arguments("lora", base, book, tmp_path / "run", *SHORT, "--recipe", "best")
    assert run(main, *argv).status == 0
    assert "nothing to resume" in run(main, *argv, "--resume").stdout
    line = one_line(run(main, *argv[:-1], "reference", "--lr", 8e-3, "--resume"), 2)
    assert "--recipe was best and is now reference; repeat the run's options" in line


def test_full_fine_tuning_has_no_recipe(base, book, tmp_path):
    argv = arguments("full", base, book, tmp_path / "run", "--recipe", "best")
    assert "--recipe best" in one_line(run(main, *argv), 2)
    assert parse_options("-", ["full"]).as_json().keys().isdisjoint({"recipe"})


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_those_of_the_reference_run(method):
    """They differ in the windows, the precision and clipping."""
    default = vars(parse_options("-", [method]))
    reference = vars(parse_options("-", [method, *split(METHODS[method])]))
    different = {name for name in default if default[name] != reference[name]}
    assert different == {"block_size", "stride", "label_shift", "precision", "clip"}


@pytest.mark.parametrize(
    "figure, label, options",
    [
        ("variants", "rsLoRA", "--use-rslora"),
        ("variants", "DoRA", "--use-dora"),
        ("variants", "PiSSA", "--init-lora-weights pissa"),
        ("variants", "LoRA+, ratio 16", "--loraplus-lr-ratio 16"),
        ("targets", "c_attn: r = 20", "--target-modules c_attn --r 20"),
        ("targets", "c_fc, mlp.c_proj: r = 8", "--target-modules c_fc mlp.c_proj"),
        ("scaling", "alpha = 2 r: s = 2/1", "--lora-alpha 2 --r 1"),
        ("scaling", "alpha = 2 r: s = 2/64", "--lora-alpha 128 --r 64"),
    ],
)
def test_the_recipes_rate_is_near_the_best_one_that_was_measured(figure, label, options):
    """The runs have 60 steps and read the text 1.45 times."""
    data = json.loads((ROOT / "docs" / "figures" / f"{figure}.json").read_text())["results"]
    for key in label.split("/"):
        data = data[key]
    with_neighbours = {float(lr): mean(found) for lr, found in data.items() if len(found) == 3}
    best = min(with_neighbours, key=with_neighbours.__getitem__)
    factor = rate_factor(parse_options("-", ["lora", "--recipe", "best", *split(options)]))
    assert 0.7 < best_rate(60, 1.45) * factor / best < 1.4


def test_a_sweep_leaves_the_rate_to_the_recipe(tmp_path):
    asked = Namespace(method="lora", lr=None, r=[4], seed=[1], out=tmp_path)
    (best,) = sweep.plan(asked, ["--recipe", "best"])
    (plain,) = sweep.plan(asked, [])
    assert (best.name, plain.name) == ("r=4,seed=1", "lr=0.0003,r=4,seed=1")
