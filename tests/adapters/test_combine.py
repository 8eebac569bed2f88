"""`python -m adapters.combine`: exact sums, truncation, and loading the result into stock PEFT."""

import json
from pathlib import Path

import pytest
import torch

from adapters.combine import combine, main
from adapters.factors import read_factors
from adapters.load import load_model
from common.errors import UserError
from lora.inject import lora_layers
from lora.load import load_adapter, read_header
from lora.peft_config import CONFIG
from lora.save import WEIGHTS, save_adapter
from storage.tensors import read_shapes
from storage.weights import load_gpt2
from tests.helpers import relative_difference
from tests.pairs import ALL_FOUR, IDS, adapted, randomize
from tests.runs import one_line, run, stdout_of, stock_model

PATTERNS = {
    "r": 3,
    "use_rslora": True,
    "rank_pattern": {"h.0.attn.c_attn": 6},
    "alpha_pattern": {"c_fc": 5},
}


@pytest.fixture
def adapters(base, tmp_path) -> list[Path]:
    """Two adapters with different ranks, scalings and layers. Both adapt c_attn."""
    one = adapted(base, ("c_attn",), r=3, lora_alpha=5)
    other = adapted(base, ("c_attn", "c_fc"), r=2, use_rslora=True)
    randomize(other, seed=9)
    for name, model in (("0", one), ("1", other)):
        save_adapter(model, tmp_path / name, "gpt2", "a" * 64)
    return [tmp_path / "0", tmp_path / "1"]


def changes(base, directory) -> dict[str, torch.Tensor]:
    model = load_gpt2(base)
    load_adapter(model, directory)
    return {name: layer.delta_weight() for name, layer in lora_layers(model).items()}


def dense_sum(base, adapters, weights):
    """Return the base with the weighted sum of changes added, and the sum."""
    total = {}
    for directory, weight in zip(adapters, weights, strict=True):
        for name, change in changes(base, directory).items():
            total[name] = total.get(name, 0) + weight * change
    model = load_gpt2(base)
    for name, change in total.items():
        model.get_submodule(name).weight.data += change
    return model, total


def test_the_sum_is_that_of_the_dense_changes_also_in_stock_peft(base, adapters, tmp_path):
    weights = (0.5, -2)
    out = tmp_path / "out"
    said = stdout_of(main, *adapters, "--weights", *weights, "--out", out)
    assert said == f"{out}: r = lora_alpha = 5, 100.00% of the sum's squared norm\n"

    dense, total = dense_sum(base, adapters, weights)
    assert relative_difference(dense(IDS), load_gpt2(base)(IDS)) > 0.1
    combined = changes(base, out)
    assert combined.keys() == total.keys() and len(total) == 4
    for name, change in total.items():
        assert relative_difference(combined[name], change) < 1e-6
    assert relative_difference(stock_model(base, out)(IDS).logits, dense(IDS)) < 1e-5


def test_truncation_loses_the_discarded_singular_values(base, adapters, tmp_path):
    """By Eckart-Young, the error is the norm of the discarded singular values of the dense sum."""
    said = stdout_of(main, *adapters, "--rank", 2, "--out", tmp_path / "out")
    cut = changes(base, tmp_path / "out")
    _, total = dense_sum(base, adapters, (1, 1))
    kept = 0.0
    whole = 0.0
    for name, change in total.items():
        s = torch.linalg.svdvals(change.double())
        discarded = s[2:].norm().item()
        assert (cut[name] - change).norm() == pytest.approx(discarded, rel=1e-4, abs=1e-5)
        kept += s[:2].square().sum().item()
        whole += s.square().sum().item()
    assert f"lora_alpha = 2, {kept / whole:.2%} of" in said and kept / whole < 0.99


@torch.no_grad()
def test_one_adapter_becomes_plain_lora(base, tmp_path):
    """A server that does not support the variant then computes the adapter's logits."""
    model = adapted(base, ALL_FOUR, **PATTERNS)
    save_adapter(model, tmp_path / "lora", "owner/name", "a" * 64, "v2")
    out = tmp_path / "plain"
    stdout_of(main, tmp_path / "lora", "--out", out)
    stored = json.loads((out / CONFIG).read_text())
    assert stored["r"] == stored["lora_alpha"] == 6
    assert not stored["use_rslora"] and not stored["rank_pattern"] and not stored["alpha_pattern"]
    assert stored["layers_to_transform"] is None and len(stored["target_modules"]) == 8
    assert {min(shape) for shape in read_shapes(out / WEIGHTS).values()} == {6}
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("owner/name", "v2")
    assert read_header(out)["base_sha256"] == "a" * 64

    expected = stock_model(base, tmp_path / "lora")(IDS).logits
    assert relative_difference(stock_model(base, out)(IDS).logits, expected) < 1e-5
    assert relative_difference(expected, stock_model(base)(IDS).logits) > 0.01


def test_a_sum_of_more_ranks_than_a_layer_holds_is_cut_to_what_loads(base, tmp_path):
    save_adapter(adapted(base, ("c_proj",), r=20), tmp_path / "a", "gpt2")
    factors = read_factors(tmp_path / "a")
    combined, kept = combine([factors, factors], [1, 2])
    assert kept == pytest.approx(1) and {len(f.A) for f in combined.values()} == {32}
    for name, (b, a) in combined.items():
        assert torch.allclose(b @ a, 3 * factors[name].B @ factors[name].A)


def test_adapters_of_different_bases_and_wrong_options_are_refused(base, adapters, tmp_path):
    other = tmp_path / "other"
    save_adapter(adapted(base, ("c_attn",), r=3), other, "gpt2", "b" * 64)
    dora = tmp_path / "dora"
    save_adapter(adapted(base, ("c_attn",), r=3, use_dora=True), dora, "gpt2")
    for arguments, reason in (
        ((adapters[0], other), f"{adapters[0]} and {other}: are adapters of different bases"),
        ((dora,), f"{dora}: is DoRA, whose change is not B A alone; merge it instead"),
        ((*adapters, "--weights", 1), "--weights: 1 weights for 2 adapters"),
        ((other, "--out", other), f"--out {other}: exists already; name a new directory"),
    ):
        ending = run(main, "--out", tmp_path / "out", *arguments)
        assert ending.stdout == "" and not (tmp_path / "out").exists()
        assert one_line(ending, 2) == f"error: {reason}"
    assert run(main, other, "--out", tmp_path / "out").status == 0
    with pytest.raises(UserError, match="another base"):  # the copy keeps the hash
        load_model(str(base), tmp_path / "out")
