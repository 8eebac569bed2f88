"""`python -m adapters.extract`: the best adapter of a full fine-tuning."""

import shutil

import pytest
import torch

from adapters.extract import main
from adapters.load import load_model
from lora.inject import lora_layers
from storage.weights import load_gpt2, save_gpt2
from tests.helpers import perturb, relative_difference, tiny_gpt2_directory
from tests.runs import one_line, run, stdout_of, stock_model, table


@pytest.fixture
def full(base, tmp_path):
    """A model that differs from the base in every parameter, including biases."""
    model = load_gpt2(base)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        perturb(model, std=0.02)
    save_gpt2(model, tmp_path / "full")
    return tmp_path / "full"


@pytest.mark.parametrize("rank", [5, 32])
def test_each_layers_change_is_the_best_of_its_rank(base, full, tmp_path, rank):
    out = tmp_path / "out"
    targets = ("--target-modules", "c_attn", "mlp.c_proj")
    options = ("--base", base, "--full", full, "--rank", rank, "--out", out)
    said = stdout_of(main, *options, *targets)
    before = dict(load_gpt2(base).named_parameters())
    after = dict(load_gpt2(full).named_parameters())
    model = load_model(str(base), out).model  # checks the hash
    theirs = stock_model(base, out).merge_and_unload()
    inside = 0.0
    for name, layer in lora_layers(model).items():
        change = (after[f"{name}.weight"] - before[f"{name}.weight"]).detach().double()
        s = torch.linalg.svdvals(change)
        error = (layer.delta_weight() - change).norm()
        assert error == pytest.approx(s[rank:].norm().item(), rel=1e-4, abs=1e-5)
        norms_of_a = layer.lora_A.weight.norm(dim=1)
        norms_of_b = layer.lora_B.weight.norm(dim=0)
        assert torch.allclose(norms_of_a, norms_of_b, rtol=1e-4)  # split evenly

        share = s[:rank].square().sum() / s.square().sum()
        [cells] = [row for row in table(said) if row[0] == name]
        assert cells[1:] == [f"{change.norm():.4g}", f"{share:.2%}"]
        inside += change.square().sum()
        if rank == 32:
            merged = theirs.transformer.get_submodule(name).weight.T  # stored as Conv1D's (in, out)
            assert relative_difference(merged, after[f"{name}.weight"]) < 1e-6
    whole = sum((after[name] - before[name]).double().square().sum() for name in before)
    assert f"{1 - inside / whole:.2%} of the whole change's squared norm is out" in said


def test_a_layer_that_did_not_change_is_zero(base, tmp_path):
    said = stdout_of(main, "--base", base, "--full", base, "--out", tmp_path / "out")
    assert [row[1:] for row in table(said)[2:]] == [["0", "0.00%"]] * 2
    assert "\n0.00% of the whole change's squared norm is outside" in said


def test_what_cannot_be_extracted_is_refused_in_one_line(base, full, tmp_path):
    for options, reason in (
        (("--rank", 33), "--rank, --target-modules: h.0.attn.c_attn: rank 33 is out"),
        (("--target-modules", "wte"), "'wte' is refused"),
        (("--target-modules", "c_attn.q"), "cannot extract a slice of c_attn"),
        (("--full", "nowhere"), "nowhere: has neither"),
        (("--out", base), "exists already"),
    ):
        ending = run(main, "--base", base, "--full", full, "--out", tmp_path / "out", *options)
        assert ending.stdout == "" and not (tmp_path / "out").exists()
        assert reason in one_line(ending, 2)


def test_another_base_than_the_run_records_is_refused(runs, base, tmp_path):
    """A directory counts as a run if it has a run.json. Any other directory is accepted."""
    other, _ = tiny_gpt2_directory(tmp_path / "other", seed=1)
    full = shutil.copytree(runs["full"].out, tmp_path / "full")
    out = tmp_path / "out"
    line = one_line(run(main, "--base", other, "--full", full, "--out", out), 2)
    assert line.startswith(f"error: {full / 'run.json'}: the run began from another base than")
    assert not out.exists()
    assert run(main, "--base", base, "--full", full, "--out", out).status == 0

    (full / "run.json").unlink()
    assert run(main, "--base", other, "--full", full, "--out", tmp_path / "any").status == 0
