"""Compare the variants of LoRA with PEFT, and slices with loralib's formula.

PEFT's side is a model of `nn.Linear` layers, like ours. On GPT-2's Conv1D, PEFT's DoRA has been
wrong (peft#3531: unmerging forgot the transpose). Files are tested on stock GPT-2.
"""

import json
import signal
from shlex import split

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora.config import LoRAConfig
from lora.inject import adapter_disabled, inject, lora_layers
from lora.layer import LoRALinear
from lora.load import load_adapter
from lora.merge import merge, unmerge, unwrap
from lora.peft_config import CONFIG
from lora.save import WEIGHTS, adapter_state_dict, save_adapter
from model.kernels.fast import set_kernels
from storage.weights import load_gpt2
from tests import runs
from tests.helpers import relative_difference, tiny_gpt2_directory
from tests.pairs import IDS, output_and_gradients, pair, parameters, perturb_alike, randomize
from tests.runs import arguments, run, stock_linear_model, stock_model, trained
from train import learning_rate, main

FP32, BF16 = torch.float32, torch.bfloat16
WIDE, TALL = (32, 96), (96, 32)
DORA = {"use_dora": True}
PISSA = {"init_lora_weights": "pissa"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a base with heads of 16: 1/sqrt(16) is exact however it is computed."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_head=2)[0]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("kind", ["dora", "pissa"])
@pytest.mark.parametrize(
    ("shape", "fields"),
    [(WIDE, {"use_rslora": True}), (TALL, {"lora_dropout": 0.3})],
)
def test_gradients_and_the_merge_are_pefts(kind, shape, fields):
    """Another test below compares the steps of a whole run."""
    ours, theirs, linear = pair(kind, shape, **fields)
    assert torch.equal(ours.base_layer.weight, theirs.base_layer.weight)  # for PiSSA, the residual
    x = torch.randn(5, shape[0])
    assert relative_difference(ours.eval()(x), linear(x)) < 1e-6
    perturb_alike(ours, theirs)
    assert_equal(*(output_and_gradients(layer, x) for layer in (ours, theirs)))

    expected, before = ours.eval()(x), ours.base_layer.weight.clone()
    assert relative_difference(expected, linear(x)) > 0.1
    model = nn.Sequential(ours)
    merge(model)
    theirs.merge()
    assert relative_difference(ours.base_layer.weight, theirs.base_layer.weight) < 1e-6
    assert relative_difference(ours(x), expected) < 1e-5
    assert kind != "dora" or "merged_norm" in dict(ours.named_buffers())  # it moves with the layer
    unmerge(model)
    assert relative_difference(ours.base_layer.weight, before) < 1e-5
    if kind == "pissa":
        with pytest.raises(ValueError, match="merge the adapter first"):
            unwrap(model)
    with adapter_disabled(model):
        assert relative_difference(ours.eval()(x), linear(x)) < 1e-5
        assert relative_difference(ours.train()(x), linear(x)) < 1e-5


@pytest.mark.parametrize("kind", ["dora", "pissa"])
@pytest.mark.parametrize(("dtype", "autocast"), [(FP32, True), (BF16, False)])
def test_in_bf16_outputs_and_gradients_are_pefts_within_its_rounding(kind, dtype, autocast):
    ours, theirs, _ = pair(kind, WIDE, dtype, lora_dropout=0.3)
    perturb_alike(ours, theirs)
    x = torch.randn(7, 32, dtype=dtype)
    ours, theirs = (output_and_gradients(layer, x, autocast) for layer in (ours, theirs))
    for name, value in ours.items():
        assert relative_difference(value, theirs[name]) < 4 * torch.finfo(BF16).eps, name
        assert value.dtype == theirs[name].dtype


def test_a_magnitude_that_moves_by_a_thousandth_acts_in_bf16():
    layer, _, linear = pair("dora", WIDE, BF16)
    layer.lora_magnitude_vector.data *= 1.001
    x = torch.randn(7, 32, dtype=BF16)
    y = linear(x).detach()
    update = layer.update(x.float(), y)
    assert relative_difference(update, 0.001 * (y - linear.bias.detach())) < 0.02


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_weights_are_computed_in_fp32_under_autocast(kind):
    """From the start to the merge and back, to the last bit."""
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", BF16, enabled=enabled):
            layer, _, _ = pair(kind, WIDE)
            start = [parameter.clone() for parameter in layer.parameters()]
            randomize(layer)
            delta = layer.delta_weight()
            layer.merge()
            merged = layer.base_layer.weight.clone()
            layer.unmerge()
        found.append([*start, delta, merged, layer.base_layer.weight])
    for outside, inside in zip(*found, strict=True):
        assert torch.equal(inside, outside)


def test_a_pissa_that_was_rounded_is_merged_as_it_is_evaluated():
    layer, _, _ = pair("pissa", WIDE)
    randomize(layer.to(BF16).float().eval())
    x = torch.randn(5, 32)
    expected = layer(x)
    layer.merge()
    assert relative_difference(layer(x), expected) < 1e-5


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1e8])
def test_a_merge_of_any_magnitude_is_undone(magnitude):
    layer, _, linear = pair("dora", WIDE)
    randomize(layer)
    with torch.no_grad():
        layer.lora_magnitude_vector[3] = magnitude
    layer.merge()
    layer.unmerge()
    assert relative_difference(layer.base_layer.weight, linear.weight) < 1e-5
    with torch.no_grad():
        layer.lora_magnitude_vector[3] = 0
    layer.merge()
    with pytest.raises(ValueError, match="a magnitude is 0, so the merge cannot be undone"):
        layer.unmerge()


TOGETHER = "--use-dora --use-rslora --target-modules c_attn c_proj"
# PEFT's fields for options of train.py.
RUNS = {
    "--init-lora-weights pissa": PISSA,
    TOGETHER: {**DORA, "use_rslora": True, "target_modules": ["c_attn", "c_proj"]},
}


@pytest.mark.parametrize("options", RUNS)
def test_a_run_is_pefts_to_the_last_bit(base, book, tmp_path, options):
    """Dropout is on. The start is the seeded adapter, and train.py's code takes each step."""
    short = split("--max-steps 20 --batch-size 4 --lr 3e-3")
    ours = runs.trainer("lora", base, book, tmp_path, *short, *split(options), "--kernels", "plain")
    args = ours.options
    stock = stock_linear_model(base)
    torch.manual_seed(args.seed)
    fields = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["c_attn"]}
    theirs = peft.get_peft_model(stock, peft.LoraConfig(**fields | RUNS[options])).train()
    set_kernels(theirs, "plain")  # the same memory layout of the frozen weights
    named = {}
    for name, parameter in parameters(theirs.base_model.model).items():
        named[name.removeprefix("transformer.")] = parameter
    assert named.keys() == ours.parameters.keys()
    mine = [named[name] for name in ours.parameters]  # in one order, for the gradient norm
    optimizer = torch.optim.AdamW(mine, lr=args.lr, weight_decay=0.01, fused=True)

    initial = {key: x.detach().clone() for key, x in raw_tensors(ours.model).items()}
    assert_equal(initial, peft.get_peft_model_state_dict(theirs))
    batches = list(ours.batches())
    torch.manual_seed(0)
    for batch in batches:
        ours.step(batch)
    torch.manual_seed(0)
    for step, batch in enumerate(batches):
        [(inputs, targets)] = batch.micro_batches
        F.cross_entropy(theirs(input_ids=inputs).logits.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(mine, args.clip)
        [group] = optimizer.param_groups
        group["lr"] = learning_rate(step, len(batches), args.lr, args.warmup_ratio)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(raw_tensors(ours.model), peft.get_peft_model_state_dict(theirs))
    for key, tensor in raw_tensors(ours.model).items():
        assert not torch.equal(tensor, initial[key])


def raw_tensors(model):
    """Return the trained tensors. For PiSSA, a file stores other tensors."""
    return {f"base_model.model.transformer.{n}": p for n, p in parameters(model).items()}


@pytest.mark.parametrize(
    "options",
    [
        TOGETHER,
        "--init-lora-weights pissa",
        "--use-rslora --precision bf16",
        "--target-modules c_attn.q c_attn.v c_proj --use-rslora",
    ],
)
def test_a_run_resumes_to_the_byte_and_its_file_is_pefts(base, book, tmp_path, options):
    options = split(f"--max-steps 6 --batch-size 8 --eval-every 2 --lr 1e-2 {options}")
    whole = trained("lora", base, book, tmp_path / "whole", *options)
    argv = arguments("lora", base, book, tmp_path / "run", *options)
    stop = {4: lambda trainer: signal.raise_signal(signal.SIGINT)}
    assert runs.run_acting(stop, *argv).status == 130
    assert run(main, *argv, "--resume").status == 0
    done = runs.finished(tmp_path / "run")
    for file in (WEIGHTS, CONFIG):
        assert runs.contents(done.out)[file] == runs.contents(whole.out)[file]
    assert done.column("val_loss") == whole.column("val_loss")

    report = done.report
    _, ids = runs.token_parts(book)
    close = 2e-2 if "bf16" in options else 1e-5
    base_loss = runs.validation_loss(stock_model(base), ids)
    assert report["base_val_loss"] == pytest.approx(base_loss, rel=close)
    theirs = stock_model(base, done.out)
    assert report["best_val_loss"] == pytest.approx(runs.validation_loss(theirs, ids), rel=close)
    assert report["best_val_loss"] < report["base_val_loss"] - 0.01
    ours = load_gpt2(base)
    load_adapter(ours, done.out)
    assert relative_difference(ours(IDS), theirs(IDS).logits) < 1e-5


def test_a_state_dict_with_pissa_is_exact_on_another_base(base, tmp_path):
    other = tiny_gpt2_directory(tmp_path, seed=1, n_head=2)[0]
    model, target = load_gpt2(base), load_gpt2(other)
    for made in (model, target):
        inject(made, LoRAConfig(lora_dropout=0.0, **PISSA))
    randomize(model)
    assert relative_difference(target(IDS), model(IDS)) > 0.1
    target.load_state_dict(model.state_dict())
    for training in (True, False):
        for made in (model, target):
            made.train(training).set_dropout(0)
        assert torch.equal(target(IDS), model(IDS))
    assert_equal(adapter_state_dict(target), adapter_state_dict(model))


def merged_linear(x, linear, a, b, enabled, scaling):
    """Compute loralib's MergedLinear: A (n r, in) and B (n d, r), by a convolution of n groups."""
    out = linear.out_features
    n = sum(enabled)
    update = F.conv1d((x @ a.T).mT, b.unsqueeze(-1), groups=n).mT  # (B, T, n d)
    y = torch.zeros(*x.shape[:-1], out)
    places = torch.tensor(enabled).repeat_interleave(out // len(enabled))
    y[..., places] = update
    return linear(x) + y * scaling


NAMED = "transformer.h.1.attn.c_attn"


@pytest.mark.parametrize(
    ("targets", "enabled", "use_rslora", "file"),
    [
        (("c_attn.q", "attn.c_attn.v"), [True, False, True], True, (8, 6 * 2**0.5, {}, {})),
        (
            ("c_attn.v", "mlp.c_proj", "h.1.attn.c_attn.k"),
            [False, False, True],
            False,
            (4, 6, {NAMED: 8}, {NAMED: 12}),
        ),
    ],
)
def test_slices_are_loralibs_and_written_as_a_plain_adapter(
    base, tmp_path, targets, enabled, use_rslora, file
):
    model = load_gpt2(base)
    fields = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.3, "use_rslora": use_rslora}
    config = LoRAConfig(target_modules=targets, **fields)
    torch.set_default_dtype(torch.float64)  # A and B are in fp32 all the same
    inject(model, config)
    torch.set_default_dtype(FP32)
    layer = model.h[0].attn.c_attn
    n = sum(enabled)
    assert layer.lora_dropout.p == 0.3
    assert 0.8 < 32**0.5 * layer.lora_A.weight.abs().max() < 1 and not layer.lora_B.blocks.any()
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == n * 4 * (32 + 32)
    randomize(model)
    a = layer.lora_A.weight
    b = layer.lora_B.blocks
    twins = [p.detach().clone().requires_grad_() for p in (a, b.flatten(0, 1))]
    x = torch.randn(2, 5, 32)
    y = layer(x)
    scaling = 6 / (2 if use_rslora else 4)
    expected = merged_linear(x, layer.base_layer, *twins, enabled, scaling)
    assert relative_difference(y, expected) < 1e-6
    for mine, theirs in zip(
        torch.autograd.grad(y.square().sum(), (a, b)),
        torch.autograd.grad(expected.square().sum(), twins),
        strict=True,
    ):
        assert relative_difference(mine.flatten(0, -2), theirs) < 1e-5

    save_adapter(model, tmp_path, "gpt2")
    stored = json.loads((tmp_path / CONFIG).read_text())
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    assert file == tuple(stored[name] for name in names)
    assert stored["lora_dropout"] == 0.3
    expected = model(IDS)
    assert relative_difference(stock_model(base, tmp_path)(IDS).logits, expected) < 1e-6
    again = load_gpt2(base)
    assert relative_difference(again(IDS), expected) > 0.05
    load_adapter(again, tmp_path)
    assert relative_difference(again(IDS), expected) < 1e-6
    assert all(type(layer) is LoRALinear for layer in lora_layers(again).values())
    merge(model)
    assert relative_difference(model(IDS), expected) < 1e-5
