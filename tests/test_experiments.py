"""The lesson's experiments in their short form, and its formulas against autograd."""

import math
import shutil
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import nn

from lesson.experiments import (
    alone,
    amplification,
    changes,
    diagram,
    first_step,
    gradients,
    initialisation,
    intruders,
    learning_rate,
    memory,
    merge_error,
    quantisation,
    quantised_memory,
    rates,
    regret,
    scaling,
    spectrum,
    step_time,
    sweep,
    targets,
    variants,
)
from lesson.experiments.common import SHORT, trainer
from lora.inject import inject
from lora.layer import LoRAConfig, LoRALinear
from model.gpt2 import GPT2
from storage.hub import MINI
from storage.weights import load_config, load_gpt2
from tests.legible import only_legible_pictures
from training import data as training_data
from training.options import ROOT
from training.recipe import best_rate
from training.report import count_parameters

load_tokenizer = cache(training_data.load_tokenizer)


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch, tmp_path_factory):
    """Every test trains its own runs."""
    monkeypatch.setattr(sweep, "CELLS", tmp_path_factory.mktemp("runs") / "cells.jsonl")


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch):
    """Every run here has mini's, which takes as long to load as a step."""
    monkeypatch.setattr(training_data, "load_tokenizer", load_tokenizer)


FIGURES = ROOT / "docs" / "figures"


def experiments_with_data():
    """Return the experiments that can draw again, by the names of their published data."""
    names = [path.stem for path in sorted(FIGURES.glob("*.json"))]
    modules = [import_module(f"lesson.experiments.{name}") for name in names]
    return [module for module in modules if hasattr(module, "measure")]


@pytest.mark.parametrize("experiment", experiments_with_data(), ids=lambda module: module.__name__)
def test_the_published_pictures_can_be_read(experiment, tmp_path):
    """At a page's width no word is too small, on another, or cut off; none needs a new run."""
    name = experiment.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit, match="2"):  # there is no data yet
        experiment.main(["--draw", "--out", str(tmp_path)])
    shutil.copy(FIGURES / f"{name}.json", tmp_path)
    with only_legible_pictures() as pictures:
        experiment.main(["--draw", "--out", str(tmp_path)])
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert name in drawn
    assert len(drawn) == len(pictures)
    assert all((FIGURES / f"{picture}.png").exists() for picture in drawn)


def run(experiment, tmp_path):
    """Run the short version, which must leave data and a picture; return the data."""
    data = experiment.main(["--short", "--out", str(tmp_path)])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    return data


def test_an_experiment_that_cannot_be_saved_does_not_begin(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit, match="2"):
        targets.main(["--out", str(file)])
    assert f"error: --out {file}: File exists" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        targets.main(["--seeds", "0"])


def test_diagrams(tmp_path):
    """The numbers in the pictures are those of GPT-2's c_attn and attn.c_proj at rank 8."""
    with only_legible_pictures():
        diagram.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"lora.png", "product.png"}

    said = " ".join(words for words, *_ in diagram.LAYER_TEXTS)
    trained, frozen = parameters_of_a_layer(768, 2304)
    assert f"{trained:,} parameters" in said
    assert f"{frozen:,} parameters" in said
    assert f"{100 * trained / frozen:.1f} %" in said

    said = " ".join(words for words, *_ in diagram.PRODUCT_TEXTS)
    trained, frozen = parameters_of_a_layer(768, 768)
    assert f"{trained:,} numbers are trained\nin place of {frozen:,}" in said
    assert f"a {frozen / trained:.0f}th" in said
    b, a, product = [width * height for _, _, width, height, *_ in diagram.PRODUCT_BOXES]
    assert (b + a) / product == pytest.approx(trained / frozen)


def parameters_of_a_layer(inputs, outputs):
    """Return how many parameters LoRA of rank 8 trains, and how many of W it leaves alone."""
    layer = LoRALinear(nn.Linear(inputs, outputs), LoRAConfig(r=8, lora_alpha=16))
    trained = sum(p.numel() for p in layer.saved_tensors().values())
    return trained, layer.base_layer.weight.numel()


def test_alpha_is_the_learning_rate_of_b():
    """AdamW on s B A at one rate is AdamW on B' A with B' = s B at s times the rate for B'."""
    torch.manual_seed(0)
    batches = torch.randn(5, 7, 12).double()
    target = torch.randn(7, 20).double()
    results = []
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


def test_first_step():
    """A step moves W as far as the formula says; at a fixed alpha it gains as much at any rank."""
    found = first_step.main(["--short"])["mini"]
    move_of_rank_8 = 2 * (8 / (3 * 256)) ** 0.5
    assert found["r 8, alpha 16"]["h.0.attn.c_attn"] == pytest.approx(move_of_rank_8, rel=0.05)
    assert found["r 8, alpha 16"]["h.0.mlp.c_proj"] == pytest.approx(move_of_rank_8 / 2, rel=0.05)

    gain = {kind: measured["gain"] for kind, measured in found.items()}
    assert gain["r 64, alpha 16"] == pytest.approx(gain["r 8, alpha 16"], rel=0.1)
    assert gain["r 1, alpha 16"] == pytest.approx(gain["r 8, alpha 16"], rel=0.1)
    assert gain["r 64, alpha 128"] == pytest.approx(8 * gain["r 8, alpha 16"], rel=0.1)
    assert gain["full"] > 10 * gain["r 8, alpha 16"]


def test_initialisation(tmp_path):
    """Where B is zero A's first gradient is, and the other way round; both zero never move."""
    data = run(initialisation, tmp_path)["runs"]
    (zero,) = data["both zero"]
    assert zero["loss"] == zero["A"] == zero["B"] == [0.0] * 3

    (lora,) = data["A random, B zero (LoRA)"]
    assert lora["loss"][0] == lora["A"][0] == 0 < lora["B"][0]
    assert lora["A"][1] > 0
    assert lora["loss"][-1] < -0.01

    (swapped,) = data["A zero, B random"]
    assert swapped["loss"][0] == swapped["B"][0] == 0 < swapped["A"][0]
    assert swapped["B"][1] > 0
    assert swapped["loss"][-1] < -0.01

    (random,) = data["both random"]
    assert random["loss"][0] > 0.1
    assert random["A"][0] > 0
    assert random["B"][0] > 0


def test_gradients(tmp_path):
    """Without the scaler fp16 loses many gradients, or their last bits; with it next to none."""
    data = run(gradients, tmp_path)
    assert data["zero_in_fp16"] < data["subnormal_in_fp16"]
    assert data["subnormal_in_fp16"] > 0.1
    assert data["below_normal_after_scaling"] < 1e-3


def test_learning_rate(tmp_path):
    """A higher rate learns more and forgets more; LoRA needs a higher one than full."""
    data = run(learning_rate, tmp_path)
    base = data["base"]
    for method in ("lora", "full"):
        low, high = (run for (run,) in data[method].values())  # one seed at each of two rates
        low_perplexity, low_kl = low
        high_perplexity, high_kl = high
        assert high_perplexity < low_perplexity < base
        assert 0 < low_kl < high_kl
    assert data["full"][1e-3][0] < data["lora"][1e-2][0]


def test_targets_at_one_count_of_parameters(tmp_path, monkeypatch):
    for names, r in targets.RANKS.items():
        with torch.device("meta"):  # shapes without numbers
            model = GPT2(load_config(MINI))
            inject(model, LoRAConfig(r=r, target_modules=names))
        assert count_parameters(model)["trainable_parameters"] == 122_880

    compared = {("c_attn",): 20, ("c_fc", "mlp.c_proj"): 8}
    monkeypatch.setattr(targets, "RANKS", compared)
    monkeypatch.setattr(targets, "GUESS", 8e-3)
    data = run(targets, tmp_path)
    (c_attn,) = data["c_attn: r = 20"][targets.GUESS]
    (mlp,) = data["c_fc, mlp.c_proj: r = 8"][targets.GUESS]
    assert mlp < c_attn - 1


def test_the_rules_for_the_scaling_agree_at_rank_8_alone():
    for rule, r8, r64 in zip(scaling.RULES.values(), (2, 2, 2), (0.25, 2, 2 / 8**0.5), strict=True):
        assert LoRAConfig(r=8, **rule(8)).scaling == pytest.approx(r8)
        assert LoRAConfig(r=64, **rule(64)).scaling == pytest.approx(r64)


def test_scaling(tmp_path):
    """A higher rank learns more, by each rule at the rate that suits it."""
    data = run(scaling, tmp_path)
    for rule in scaling.RULES:
        (low,) = data[rule][1].values()
        (high,) = data[rule][64].values()
        assert high < low
    assert len(data["full"]) == 1


def test_rates(tmp_path, monkeypatch):
    """A run's passes count what it reads of what it may read."""
    monkeypatch.setattr(rates, "RUNS", ((60, 8, 64, 8, 8e-3), (240, 2, 256, 1, 2e-3)))
    data = run(rates, tmp_path)
    whole, quarter = data.values()
    tokens = len(trainer(max_steps=1).data.training.tokens)
    assert whole["passes"] == pytest.approx(60 * 8 * 64 / tokens)
    assert quarter["passes"] == pytest.approx(240 * 2 * 64 / (tokens / 4))


def test_the_best_rate_between_those_tried_and_the_rule_of_many():
    """The parabola finds its own lowest point; the fit finds the powers in made-up runs."""

    def around(best):
        tried = [2.0**k for k in range(-14, -2)]
        return {lr: [math.exp(3 + 0.1 * math.log2(lr / best) ** 2)] for lr in tried}

    assert rates.vertex(around(3e-3)) == pytest.approx(3e-3)
    data = {}
    for steps in (15, 60, 240):
        for passes in (1.4, 6, 23):
            best = 0.04 * steps**-0.4 * passes**-0.6
            data[f"{steps}, {passes}"] = {"steps": steps, "passes": passes, "runs": around(best)}
    assert rates.fit(data) == pytest.approx((0.04, -0.4, -0.6, 1))
    assert best_rate(60, 5.8) == pytest.approx(rates.rule(60, 5.8), rel=0.05)  # the recipe's


def test_regret(tmp_path, monkeypatch):
    """Full fine-tuning learns more than LoRA, a high rank more than a low one."""
    monkeypatch.setattr(regret, "BATCHES", {8: (60, 5e-4, 4e-3)})
    # At 4e-3 the two ranks' training losses are closer than rounding moves them.
    monkeypatch.setattr(regret, "SHARES", {64: ("all", 5e-4, 8e-3)})
    data = run(regret, tmp_path)
    (full,), (high,), (low,) = (runs[8].values() for runs in data["by batch"].values())
    assert full < high < low
    losses = []
    for runs in data["by share"].values():
        (loss,) = runs[64]["training"].values()
        losses += loss
    assert losses == sorted(losses)


def test_gaps_are_those_of_the_best_rates_in_nats():
    full = {8: {1e-3: [20.0, 22.0], 2e-3: [1.0]}}
    lora = {8: {1e-2: [42.0, 42.0], 2e-2: [50.0, 50.0]}}
    assert regret.gaps(lora, full) == [pytest.approx(math.log(2))]


def test_alone_trains_nothing_but_the_four_layers():
    base = load_gpt2(MINI)
    made = trainer("full", short=True, lr=1e-3)
    alone.learned_by_the_layers_alone(made)
    moved = set()
    for name, parameter in made.model.named_parameters():
        if not torch.equal(parameter.float(), base.get_parameter(name)):
            moved.add(name.split(".", 2)[-1])
    embeddings = {"wte.weight", "wpe.weight"}  # frozen, so held in the run's precision
    assert moved - embeddings == {f"{layer}.weight" for layer in changes.LAYERS}


def test_intruders(tmp_path, monkeypatch):
    """LoRA brings intruders and full fine-tuning none; a smaller change forgets less."""
    adapter = {"r": 1, "lr": 8e-3, "target_modules": sweep.ALL}
    compared = {"r = 1": ("lora", adapter), "full": ("full", {"lr": 1e-3})}
    monkeypatch.setattr(intruders, "RUNS", compared)
    monkeypatch.setattr(intruders, "SHOWN", ("r = 1",))
    data = run(intruders, tmp_path)
    (lora,) = data["r = 1"]
    (full,) = data["full"]
    assert lora["intruders"] > 0 == full["intruders"]
    assert lora["weights"] == full["weights"] == 24
    assert full["intruders scaled"] == {}
    for found in (lora, full):
        forgotten = [found["scores"][1], *(kl for _, kl in found["change scaled"].values())]
        assert forgotten == sorted(forgotten, reverse=True)
        assert forgotten[-1] > 0
    assert lora["intruders scaled"]["0.0"] != lora["scores"]


def test_forgetting_at_one_perplexity():
    """It is read off the change's own curve, on the side where less change learns less."""
    curve = {0.9: (29, 0.8), 0.8: (31, 0.4), 0.6: (35, 0.2)}
    found = [{"scores": (30, 0.9), "change scaled": curve}]
    assert intruders.kl_at(30, found) == pytest.approx(0.6)
    assert intruders.kl_at(29.5, found) == pytest.approx(0.7)
    assert intruders.kl_at(33, found) == pytest.approx(0.3)
    assert math.isnan(intruders.kl_at(28, found))
    assert math.isnan(intruders.kl_at(40, found))


def test_amplification(tmp_path, monkeypatch):
    """The change lies where W is larger than in random directions, and far from its largest."""
    monkeypatch.setattr(amplification, "SHOWN", ("r = 8",))
    data = run(amplification, tmp_path)
    for kind in changes.LAYERS:
        (found,) = data["r = 8"][kind]
        assert found["to its own"] < 0.3
        assert found["to random"] > 1
    torch.manual_seed(0)
    weight = torch.randn(30, 20)
    u = torch.linalg.qr(torch.randn(4000, 30, 2)).Q
    v = torch.linalg.qr(torch.randn(4000, 20, 2)).Q
    there = (u.mT @ weight @ v).square().sum((1, 2)).mean().sqrt().item()
    layer = {"layer": "h.0.mlp.c_fc.weight", "change": 1.0, "weight": weight.norm().item()}
    layer |= {"weight in the change's directions": there, "weight in its own": 1.0}
    found = amplification.ratios([layer], "mlp.c_fc", rank=2, size=600)
    assert found["to random"] == pytest.approx(1, rel=0.03)


def test_a_run_whose_result_is_known_is_not_run_again(monkeypatch):
    """What is kept is found again; another option, seed or measure is another run."""
    trained = []

    def make(method, seed, *_, **options):
        trained.append((method, seed, options["lr"]))
        return trainer(method, seed, "auto", True, **options)

    def doubled(made):
        return 2 * sweep.learned(made)["end"]

    monkeypatch.setattr(sweep, "trainer", make)
    (first,) = sweep.finetune("lora", short=True, lr=1e-2)
    assert sweep.finetune("lora", short=True, lr=1e-2) == [first]
    assert trained == [("lora", 0, 1e-2)]

    known, other = sweep.finetune("lora", (0, 1), short=True, lr=1e-2)
    assert known == first != other
    assert trained[1:] == [("lora", 1, 1e-2)]
    assert sweep.finetune("lora", short=True, lr=1e-2, measure=doubled) == [2 * first["end"]]
    assert sweep.finetune("lora", short=True, lr=1e-2, freeze_a=True) != [first]
    assert len(trained) == 4
    sweep.CELLS.unlink()
    assert sweep.finetune("lora", short=True, lr=1e-2) == [first]
    assert len(trained) == 5


def test_a_result_that_a_kill_cut_off_costs_no_other():
    sweep.keep("first", 1.5)
    sweep.keep("second", {"end": math.inf})
    whole = sweep.CELLS.read_bytes()
    sweep.CELLS.write_bytes(whole[: whole.index(b"second") + 12])
    sweep.keep("third", [3])
    assert sweep.known_cells() == {"first": 1.5, "third": [3]}


def test_the_best_rate_has_tried_neighbours_on_both_sides(monkeypatch):
    """The search walks to the least mean over the seeds, not to the first seed's least."""
    best = {0: 8.0, 1: 2.0, 2: 2.0}
    tried = []

    def finetune(method, seeds, short, measure, lr):
        tried.extend((seed, lr) for seed in seeds)
        return [{"end": abs(math.log2(lr / best[seed]))} for seed in seeds]

    monkeypatch.setattr(sweep, "finetune", finetune)
    runs = sweep.tune("lora", 0.5, (0, 1, 2))
    assert [seed for seed, lr in tried if lr == 0.25] == [0]
    found = sweep.scored(runs)
    assert found[2.0] == [2.0, 0.0, 0.0]
    assert sweep.best_rate(found) == 2.0
    assert [lr for lr, values in found.items() if len(values) == 3] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert sweep.tune("lora", 0.5, (0,), short=True) == {0.5: [{"end": 4.0}]}


def test_variants(tmp_path, monkeypatch):
    """At LoRA's rate rsLoRA, LoRA+, PiSSA and LoRA-GA learn more, and DoRA as much."""
    trained = {}
    for name, (_, options) in variants.CHOICES.items():
        model = trainer(max_steps=1, batch_size=1, **variants.SIZE | options).model
        trained[name] = count_parameters(model)["trainable_parameters"]
        monkeypatch.setitem(variants.CHOICES, name, (1e-3, options))
    assert trained.pop("LoRA-FA") < 196_608 < trained.pop("DoRA")
    assert set(trained.values()) == {196_608}

    for slow in ("LoRA-FA", "Riemannian"):
        monkeypatch.delitem(variants.CHOICES, slow)
    data = {name: runs[1e-3][0] for name, runs in run(variants, tmp_path).items()}
    lora = data.pop("LoRA")
    assert data.pop("DoRA") == pytest.approx(lora, abs=1)
    assert max(data.values()) < lora - 1


def test_similarity_is_that_of_hu_et_al():
    """phi is 1 for one subspace, 0 for orthogonal ones, and does not depend on the basis."""
    torch.manual_seed(0)
    some, others = torch.randn(2, 3, 20, 12)  # 3 blocks each
    v = torch.linalg.svd(some).Vh
    w = torch.linalg.svd(others).Vh
    found = spectrum.similarity(v, w)
    for k in range(1, 13):
        norms = [torch.linalg.matrix_norm(v[block, :k] @ w[block, :k].T) for block in range(3)]
        by_hand = torch.stack(norms).square().mean() / k
        torch.testing.assert_close(found[k - 1], by_hand)
    torch.testing.assert_close(spectrum.similarity(v, -v), torch.ones(12))

    reads_the_first_half = some.clone()
    reads_the_first_half[..., 6:] = 0
    reads_the_second_half = some.clone()
    reads_the_second_half[..., :6] = 0
    v = torch.linalg.svd(reads_the_first_half).Vh
    w = torch.linalg.svd(reads_the_second_half).Vh
    assert spectrum.similarity(v, w)[:6].max() < 1e-6


def test_spectrum(tmp_path, monkeypatch):
    monkeypatch.setattr(spectrum, "RANKS", (512, 256, 32, 0))
    monkeypatch.setitem(SHORT, "stride", 128)  # little text, so none of it twice
    data = run(spectrum, tmp_path)
    assert_shares_of_the_norm(data)
    assert_similar_directions(data)
    perplexity = {k: runs[0] for k, runs in data["cut"].items()}
    assert perplexity[512] == pytest.approx(perplexity[256], rel=1e-4)
    assert perplexity[256] < perplexity[32] < perplexity[0]


def test_cut_to_rank_0_the_matrices_are_the_bases(monkeypatch):
    monkeypatch.setattr(spectrum, "RANKS", (512, 4, 0))
    made, changes = sweep.tuned("full", 0, short=True)
    spectrum.cut(made, spectrum.decomposed(changes))
    base = load_gpt2(MINI)
    for name, change in changes.items():
        assert change.abs().max() > 1e-3
        cut = made.model.get_parameter(name).detach()
        torch.testing.assert_close(cut, base.get_parameter(name).detach(), atol=1e-5, rtol=0)


def assert_shares_of_the_norm(data):
    """LoRA's change has rank 8; full fine-tuning's is far from random, and not of rank 32."""
    lora = data["c_attn: LoRA"][0]
    full = data["c_attn: full"][0]
    random = data["c_attn: random"][0]
    assert lora[7] == pytest.approx(1)
    assert lora[6] < 0.9999
    assert full[7] > 2 * random[7]
    assert full[31] < 0.99
    assert data["mlp.c_proj: full"][0][7] < full[7]


def assert_similar_directions(data):
    """Two full fine-tunings change like directions, two LoRAs unlike ones; chance gives k / n."""
    full = torch.tensor(data["full and full"]).mean(0)
    lora = torch.tensor(data["LoRA and LoRA"]).mean(0)
    both = torch.tensor(data["LoRA and full"]).mean(0)
    chance = torch.tensor(data["random and random"]).mean(0)
    torch.testing.assert_close(chance, torch.arange(1, 257) / 256, atol=0.05, rtol=0)
    assert full[-1] == pytest.approx(1)  # all directions are the same space
    assert len(lora) == len(both) == 8
    assert (full[:8] > 0.15).all()
    assert (lora < 0.1).all()
    assert (both < full[:8] / 4).all()


def test_step_time(tmp_path, monkeypatch):
    """LoRA spares the weights' gradients and no other matmul; the parts add up to the step."""
    monkeypatch.setattr(step_time, "BATCH", 3)
    data = run(step_time, tmp_path)
    ways = {name.partition(": ")[0] for name in data}
    assert {"by hand", "fp32"} <= ways
    for way in ways:
        full = only_step(data[f"{way}: full"])
        lora = only_step(data[f"{way}: LoRA"])
        assert sum(full.values()) == pytest.approx(1), way
        assert lora["weight gradients"] == 0 < full["weight gradients"], way
        assert lora["input gradients"] > 0, way
        assert lora["forward"] > 0, way
        assert lora["A and B"] > 0 == full.get("A and B", 0), way

    full = only_step(data["by hand: full"])
    lora = only_step(data["by hand: LoRA"])
    assert lora["forward"] == lora["input gradients"] == full["weight gradients"]
    assert sum(lora.values()) == pytest.approx(0.69, abs=0.01)


def only_step(shares):
    """Return by part the share in the one step that was measured."""
    return {part: share for part, (share,) in shares.items()}


def test_memory(tmp_path):
    """The count by hand is exact, but for activations below one part in a hundred each."""
    data = run(memory, tmp_path)
    for sides in data.values():
        for part, counted in sides["predicted"].items():
            tolerance = 0.04 if part == "activations" else 2e-4  # AdamW counts its steps, too
            assert counted == pytest.approx(sides["measured"][part], rel=tolerance), part
    assert data["lora"]["measured"]["AdamW moments"] > 2 * data["lora"]["measured"]["gradients"]
    assert memory.predicted("lora", memory.GPT2Config(), 1)["gradients"] == 4 * 294_912
    assert memory.predicted("full", memory.GPT2Config(), 1)["weights"] == 4 * 124_439_808


def test_merge_error(tmp_path):
    data = run(merge_error, tmp_path)
    for name in ("fp32", "fp16", "bf16"):
        errors = data[name]["error"]
        assert errors == sorted(errors, reverse=True)  # smaller updates lose more
    assert data["bf16"]["unmoved"][0] > 0.99
    assert data["fp32"]["unmoved"][0] < 0.1
    assert data["fp32"]["error"][3] < 1e-3 < data["fp16"]["error"][3] < data["bf16"]["error"][3]


def test_quantisation(tmp_path):
    """Finer blocks and NF4's levels err less; merging into the dequantised base loses nothing."""
    data = run(quantisation, tmp_path)
    nf4 = data["error by block size"]["NF4"]
    even = data["error by block size"]["even levels"]
    assert nf4 == sorted(nf4)
    assert all(a < b for a, b in zip(nf4, even, strict=True))
    by_layer = data["error by layer"]
    assert max(by_layer["int8"].values()) < 0.02 < 0.08 < min(by_layer["nf4"].values())
    assert sum(data["histogram"]) == pytest.approx(1)

    ((fp32,), (int8,), (four_bits,)) = data["losses"].values()
    assert abs(int8["base"] - fp32["base"]) < 0.002
    assert 0.002 < four_bits["base"] - fp32["base"] < 0.05
    assert all(found["trained"] < found["base"] - 0.05 for found in (fp32, int8, four_bits))
    trained = four_bits["trained"]
    assert four_bits["into the dequantised base"] == pytest.approx(trained, abs=1e-5)
    assert four_bits["into NF4 again"] > trained + 0.01
    assert four_bits["into the original base"] != trained


def test_quantised_memory(capsys):
    found = quantised_memory.main(["--short", "--only", "nf4"])
    (nf4,) = found["nf4"]
    assert nf4["peak_mb"] > 0 and len(nf4["seconds"]) == 1
    assert "| nf4" in capsys.readouterr().out
