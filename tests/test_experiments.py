"""The lesson's experiments in their short form, and its formulas against autograd."""

from functools import cache

import pytest
import torch
from torch import nn

import train
from lesson.experiments import (
    diagram,
    gradients,
    initialisation,
    learning_rate,
    memory,
    merge_error,
    rank,
    spectrum,
    step_time,
    targets,
    variants,
)
from lesson.experiments.common import SHORT, trainer
from lora.inject import inject
from lora.layer import LoRAConfig, LoRALinear
from model.gpt2 import GPT2
from model.hub import MINI
from model.weights import load_config
from training.report import count_parameters

load_tokenizer = cache(train.load_tokenizer)


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch):
    """Every run here has mini's, which takes as long to load as a step."""
    monkeypatch.setattr(train, "load_tokenizer", load_tokenizer)


def run(experiment, tmp_path):
    data = experiment.main(["--short", "--out", str(tmp_path)])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    return data


def test_an_experiment_that_cannot_be_saved_does_not_begin(tmp_path, capsys):
    (file := tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        rank.main(["--out", str(file)])
    assert f"error: --out {file}: File exists" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        rank.main(["--seeds", "0"])


def test_diagram(tmp_path):
    """The numbers in the picture of a layer are those of GPT-2's c_attn at rank 8."""
    diagram.main(["--out", str(tmp_path)])
    assert (tmp_path / "lora.png").stat().st_size > 10_000
    layer = LoRALinear(nn.Linear(768, 2304), LoRAConfig(r=8, lora_alpha=16))
    trained = sum(p.numel() for p in layer.saved_tensors().values())
    frozen = layer.base_layer.weight.numel()
    for number in (f"{trained:,}", f"{frozen:,}", f"{trained / frozen:.1%}".replace("%", " %")):
        assert any(number in words for words in diagram.TEXTS)


def test_alpha_is_the_learning_rate_of_b():
    """AdamW on s B A at one rate is AdamW on B' A with B' = s B at s times the rate for B'."""
    torch.manual_seed(0)
    results, batches = [], torch.randn(5, 7, 12).double()
    target = torch.randn(7, 20).double()
    for alpha, rate_of_b in ((12, 0.01), (3, 0.04)):  # s is 4, and 1
        torch.manual_seed(1)
        layer = LoRALinear(nn.Linear(12, 20), LoRAConfig(r=3, lora_alpha=alpha, lora_dropout=0))
        layer.double()
        optimizer = torch.optim.AdamW(
            [
                {"params": layer.lora_A.parameters(), "lr": 0.01},
                {"params": layer.lora_B.parameters(), "lr": rate_of_b},
            ],
            eps=1e-30,
            weight_decay=0,
        )
        for x in batches:
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
        results.append((layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).detach())
    torch.testing.assert_close(*results)
    assert results[0].abs().max() > 0.01


def test_initialisation(tmp_path):
    data = {name: runs[0] for name, runs in run(initialisation, tmp_path).items()}
    lora, swapped, random, zero = (data[name] for name in initialisation.STARTS)
    assert zero["loss"] == zero["A"] == zero["B"] == [0.0] * 3  # never moves
    assert lora["loss"][0] == lora["A"][0] == 0 < lora["B"][0]
    assert swapped["loss"][0] == swapped["B"][0] == 0 < swapped["A"][0]
    assert lora["A"][1] > 0 and swapped["B"][1] > 0
    assert lora["loss"][-1] < -0.01 and swapped["loss"][-1] < -0.01
    assert random["loss"][0] > 0.1 and random["A"][0] > 0 and random["B"][0] > 0


def test_gradients(tmp_path):
    """Without the scaler fp16 loses many gradients, or their last bits; with it next to none."""
    data = run(gradients, tmp_path)
    assert data["zero_in_fp16"] < data["subnormal_in_fp16"] and data["subnormal_in_fp16"] > 0.1
    assert data["below_normal_after_scaling"] < 1e-3


def test_learning_rate(tmp_path):
    """A higher rate learns more and forgets more; LoRA needs a higher one than full."""
    data = run(learning_rate, tmp_path)
    base = data.pop("base")
    for runs in data.values():
        (low,), (high,) = runs.values()  # of one seed: perplexity on the book, KL from the base
        assert high[0] < low[0] < base and 0 < low[1] < high[1]
    assert data["full"][1e-3][0] < data["lora"][1e-2][0]


def test_rank(tmp_path):
    """A higher rank learns more, if the scaling falls with it; at rank 1 a larger one does."""
    data = run(rank, tmp_path)
    fixed, scaled, root = (data[rule] for rule in rank.RULES)
    assert fixed[64][0] < fixed[1][0] and root[64][0] < root[1][0]
    assert root[1][0] < scaled[1][0] and root[64][0] < scaled[64][0]


def test_targets_at_one_count_of_parameters(tmp_path, monkeypatch):
    for names, r in targets.RANKS.items():
        with torch.device("meta"):  # shapes without numbers
            model = GPT2(load_config(MINI))
            inject(model, LoRAConfig(r=r, target_modules=names))
        assert count_parameters(model)["trainable_parameters"] == 122_880
    compared = (("c_attn",), ("c_fc", "mlp.c_proj"))
    monkeypatch.setattr(targets, "RANKS", {names: targets.RANKS[names] for names in compared})
    c_attn, mlp = (rates[1e-2][0] for rates in run(targets, tmp_path).values())
    assert mlp < c_attn - 1


def test_variants(tmp_path, monkeypatch):
    """At LoRA's rate rsLoRA learns more, DoRA as much, PiSSA no less; LoRA+ more at a lower one."""
    trained = {
        name: count_parameters(trainer(max_steps=1, **options).model)["trainable_parameters"]
        for name, (_, options) in variants.CHOICES.items()
    }
    assert trained.pop("LoRA-FA") == 36_864 and trained.pop("DoRA") == 49_152 + 4_608
    assert set(trained.values()) == {49_152}
    for slow in ("LoRA-FA", "q and v apart"):
        monkeypatch.delitem(variants.CHOICES, slow)
    data = run(variants, tmp_path)
    rates, runs = zip(*(next(iter(found.items())) for found in data.values()), strict=True)
    lora, rslora, dora, pissa, plus = (perplexity for (perplexity,) in runs)
    assert rates[:4] == (3e-3,) * 4 and rates[4] < 3e-3
    assert max(rslora, plus) < lora - 1 and dora == pytest.approx(lora, abs=1) and pissa < lora + 1


def test_similarity_is_that_of_hu_et_al():
    """phi is 1 for one subspace, 0 for orthogonal ones, and does not depend on the basis."""
    torch.manual_seed(0)
    some, others = torch.randn(2, 3, 20, 12)  # 3 blocks each
    u, v = (torch.linalg.svd(changes).Vh for changes in (some, others))
    by_hand = [
        torch.stack(
            [torch.linalg.matrix_norm(a[:k] @ b[:k].T) ** 2 / k for a, b in zip(u, v, strict=True)]
        ).mean()
        for k in range(1, 13)
    ]
    torch.testing.assert_close(spectrum.similarity(u, v), torch.stack(by_hand))
    torch.testing.assert_close(spectrum.similarity(u, -u), torch.ones(12))
    left, right = some.clone(), some.clone()
    left[..., 6:], right[..., :6] = 0, 0
    u, v = (torch.linalg.svd(changes).Vh for changes in (left, right))
    assert spectrum.similarity(u, v)[:6].max() < 1e-6


def test_spectrum(tmp_path, monkeypatch):
    monkeypatch.setattr(spectrum, "RANKS", (512, 256, 32, 0))
    monkeypatch.setitem(SHORT, "stride", 128)  # little text, so none of it twice
    data = run(spectrum, tmp_path)
    lora, full, random = (data[f"c_attn: {kind}"][0] for kind in ("LoRA", "full", "random"))
    assert lora[7] == pytest.approx(1) and lora[6] < 0.9999  # the rank is 8, not less
    assert full[7] > 2 * random[7] and full[31] < 0.99  # far from random, and not of rank 32
    assert data["mlp.c_proj: full"][0][7] < full[7]
    same, lora, both, floor = (
        torch.tensor(data[pair]).mean(0)
        for pair in ("full and full", "LoRA and LoRA", "LoRA and full", "random and random")
    )
    torch.testing.assert_close(floor, torch.arange(1, 257) / 256, atol=0.05, rtol=0)
    assert len(lora) == len(both) == 8 and same[-1] == pytest.approx(1)
    assert (same[:8] > 0.15).all() and (lora < 0.1).all() and (both < same[:8] / 4).all()
    perplexity = {k: runs[0] for k, runs in data["cut"].items()}
    assert perplexity[512] == pytest.approx(perplexity[256], rel=1e-4)
    assert perplexity[256] < perplexity[32] < perplexity[0]


def test_step_time(tmp_path, monkeypatch):
    """LoRA spares the weights' gradients and no other matmul; the parts add up to the step."""
    monkeypatch.setattr(step_time, "BATCH", 3)
    data = run(step_time, tmp_path)
    for rows in zip(*[iter(data.items())] * 2, strict=True):  # full and LoRA, side by side
        (_, full), (name, lora) = rows
        assert [sum(step) for step in zip(*full.values(), strict=True)] == pytest.approx(
            [1] * len(full["forward"])
        )
        assert sum(lora["weight gradients"]) == 0 < min(full["weight gradients"]), name
        assert min(lora["input gradients"]) > 0 and min(lora["forward"]) > 0, name
        assert min(lora["A and B"]) > 0 == sum(full.get("A and B", [0])), name
    hand = data["by hand: LoRA"]
    assert hand["forward"] == hand["input gradients"] == data["by hand: full"]["weight gradients"]
    assert sum(sum(share) for share in hand.values()) == pytest.approx(0.69, abs=0.01)


@pytest.mark.skipif(not memory.STATM.exists(), reason="resident memory is read from Linux's /proc")
def test_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")  # the experiment sets it: undone afterwards
    data = run(memory, tmp_path)
    for sides in data.values():
        for part, predicted in sides["predicted"].items():
            assert abs(sides["measured"][part] - predicted) < 0.1 * predicted + 12e6, part
    lora, full = data["lora"]["measured"], data["full"]["measured"]
    assert lora["AdamW moments"] < 0.05 * full["AdamW moments"]
    assert lora["activations"] < 0.8 * full["activations"]
    assert memory.predicted("lora", memory.GPT2Config(), 1)["gradients"] == 4 * 294_912
    assert memory.predicted("full", memory.GPT2Config(), 1)["weights"] == 4 * 124_439_808


def test_merge_error(tmp_path):
    data = run(merge_error, tmp_path)
    for name in ("fp32", "fp16", "bf16"):
        errors = data[name]["error"]
        assert errors == sorted(errors, reverse=True)  # smaller updates lose more
    assert data["bf16"]["unmoved"][0] > 0.99 > 0.1 > data["fp32"]["unmoved"][0]
    assert data["fp32"]["error"][3] < 1e-3 < data["fp16"]["error"][3] < data["bf16"]["error"][3]
