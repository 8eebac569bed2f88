"""Compare LoRA-GA's start with PEFT's start on the same batches, and check a run with it."""

import signal
from shlex import split

import peft
import pytest
import torch
import torch.nn.functional as F

from lora.inject import inject
from lora.save import WEIGHTS
from lora.variants.lora_ga import LoRAGAConfig, LoRAGALinear, lora_ga_layers, weight_gradients
from tests import runs
from tests.helpers import relative_difference, tiny_gpt2_directory
from tests.ranks import fork
from tests.runs import arguments, run, trained
from train import main

SMALL = split("--max-steps 6 --batch-size 8 --eval-every 2 --lr 1e-2 --init-lora-weights lora_ga")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    rates = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), **rates)[0]


def peft_start(base, trainer):
    """Return PEFT's layers, initialised from the mean gradient of the trainer's first batches."""
    loraga = pytest.importorskip("peft.tuners.lora.loraga", reason="an old PEFT")
    stock = runs.stock_linear_model(base)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )

    def backward():
        for batch in list(trainer.batches())[:8]:
            [(inputs, targets)] = batch.micro_batches()
            logits = stock(input_ids=inputs).logits
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    loraga.preprocess_loraga(stock, config, backward)
    return peft.get_peft_model(stock, config).base_model.model.transformer


def signs(ours, theirs, dim):
    """Return the sign of each pair of singular vectors, which must be parallel."""
    cosines = F.cosine_similarity(ours, theirs, dim=dim)
    assert cosines.abs().min() > 1 - 1e-5
    return cosines.sign()


def test_the_start_is_pefts_up_to_the_signs_of_singular_vectors(base, book, tmp_path):
    options = (*SMALL, "--target-modules", "c_attn", "c_proj", *runs.NO_DROPOUT["lora"])
    trainer = runs.trainer("lora", base, book, tmp_path, *options, "--kernels", "plain")
    theirs = peft_start(base, trainer)
    layers = lora_ga_layers(trainer.model)
    assert len(layers) == 6
    for name, layer in layers.items():
        stock = theirs.get_submodule(name)
        original = layer.original.clone()
        remainder = original - 2 * layer.lora_B.weight @ layer.lora_A.weight
        assert relative_difference(layer.base_layer.weight, remainder) < 1e-6

        a = stock.lora_A["default"].weight
        b = stock.lora_B["default"].weight
        of_a = signs(layer.lora_A.weight, a, dim=1)
        of_b = signs(layer.lora_B.weight, b, dim=0)
        layer.start_at(of_a[:, None] * layer.lora_A.weight, of_b * layer.lora_B.weight)
        pairs = {
            "A": (layer.lora_A.weight, a),
            "B": (layer.lora_B.weight, b),
            "offset": (original - layer.base_layer.weight, original - stock.base_layer.weight),
        }
        for part, (mine, their_own) in pairs.items():
            assert relative_difference(mine, their_own) < 1e-4, (name, part)
        assert relative_difference(layer.base_layer.weight, original) > 1e-3


def flipped(layer, gradient, original=LoRAGALinear.initial_factors):
    """Return a start with other signs, as the SVD of another machine may give."""
    a, b = original(layer, gradient)
    return -a, b


def test_a_resumed_run_takes_its_start_from_the_checkpoint(base, book, tmp_path, monkeypatch):
    whole = trained("lora", base, book, tmp_path / "whole", *SMALL)
    argv = arguments("lora", base, book, tmp_path / "run", *SMALL)
    stop = {4: lambda trainer: signal.raise_signal(signal.SIGINT)}
    assert runs.run_acting(stop, *argv).status == 130
    monkeypatch.setattr(LoRAGALinear, "initial_factors", flipped)
    assert run(main, *argv, "--resume").status == 0
    assert runs.contents(tmp_path / "run")[WEIGHTS] == runs.contents(whole.out)[WEIGHTS]
    report = whole.report
    _, ids = runs.token_parts(book)
    best = runs.validation_loss(runs.stock_model(base, whole.out), ids)
    assert report["best_val_loss"] == pytest.approx(best, rel=1e-5)
    other = trained("lora", base, book, tmp_path / "other", *SMALL)
    assert runs.contents(other.out)[WEIGHTS] != runs.contents(whole.out)[WEIGHTS]


def test_two_ranks_start_and_train_as_one_does(base, book, tmp_path):
    options = (*SMALL, "--riemannian", "--grad-accum", 2, *runs.NO_DROPOUT["lora"])
    alone = trained("lora", base, book, tmp_path / "alone", *options)
    argv = arguments("lora", base, book, tmp_path / "ranks", *options)
    statuses, lines = fork(tmp_path / "said", argv, argv)
    assert statuses == [0, 0], lines
    ranks = runs.finished(tmp_path / "ranks")
    for column in ("loss", "grad_norm", "val_loss"):
        assert ranks.column(column) == pytest.approx(alone.column(column), rel=1e-3), column


def test_gradients_in_bf16_are_summed_in_fp32():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16))
    inject(model, LoRAGAConfig(r=1, target_modules=("0",)))
    with weight_gradients(model) as sums:
        for x in (256.0, 1.0):  # bf16 cannot represent 257
            model(torch.full((1, 2), x, dtype=torch.bfloat16)).sum().backward()
    assert sums["0"].tolist() == [[257.0, 257.0], [257.0, 257.0]]
