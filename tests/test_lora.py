"""The layer and its injection, against PEFT's and against plain formulas in fp64."""

import math
from contextlib import nullcontext

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.plain import plain_operations
from lora.adapter import adapter_tensors
from lora.config import LoRAConfig
from lora.inject import count_parameters, describe_parameters, inject, lora_layers
from lora.layer import LoRALinear
from model.checkpoint import load_gpt2
from model.gpt2 import GPT2, GPT2Config
from tests.adapters import ALL_FOUR, randomize
from tests.helpers import TINY, relative_difference, tiny_gpt2, token_ids

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
IDS = token_ids(TINY["vocab_size"], 2, 16)


def pair_of_layers(fan_in, fan_out, dtype=FP32, **config):
    """One linear layer under our LoRA and under PEFT's, both with the same A and B."""
    linear = nn.Linear(fan_in, fan_out, dtype=dtype)
    ours = LoRALinear(linear, LoRAConfig(**config))
    randomize(ours)
    peft_config = peft.LoraConfig(target_modules=["0"], **config)
    theirs = peft.get_peft_model(nn.Sequential(linear), peft_config).base_model.model[0]
    theirs.lora_A.default.load_state_dict(ours.lora_A.state_dict())
    theirs.lora_B.default.load_state_dict(ours.lora_B.state_dict())
    return ours, theirs


# The layer


@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
@pytest.mark.parametrize(("r", "use_rslora"), [(4, False), (4, True), (1, False), (32, True)])
def test_output_is_base_plus_scaled_low_rank_update(shape, r, use_rslora):
    layer = LoRALinear(nn.Linear(*shape).eval(), LoRAConfig(r, 3, 0.5, use_rslora=use_rslora))
    randomize(layer)
    x = torch.randn(5, shape[0])
    w, b, lora_a, lora_b = (p.double() for p in (
        layer.base_layer.weight, layer.base_layer.bias, layer.lora_A.weight, layer.lora_B.weight))
    scaling = 3 / math.sqrt(r) if use_rslora else 3 / r
    expected = x.double() @ (w + scaling * lora_b @ lora_a).T + b
    assert relative_difference(layer(x), expected) < 1e-6


@plain_operations()
@pytest.mark.parametrize(("dtype", "autocast"),
                         [(FP32, False), (FP32, True), (BF16, False), (FP16, False)])
@pytest.mark.parametrize("shape", [(32, 32), (32, 96)])
@pytest.mark.parametrize("config", [
    {"r": 4, "lora_alpha": 16, "lora_dropout": 0.3},
    {"r": 4, "lora_alpha": 3, "lora_dropout": 0.0, "use_rslora": True},
])
def test_outputs_and_gradients_are_pefts_to_the_last_bit(dtype, autocast, shape, config):
    results = []
    for layer in pair_of_layers(*shape, dtype, **config):
        x = torch.linspace(-1, 1, 7 * shape[0]).view(7, shape[0]).to(dtype).requires_grad_()
        layer.train().requires_grad_(True)
        layer.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", BF16) if autocast else nullcontext():
            y = layer(x)
        y.float().square().sum().backward()
        grads = {name.replace(".default", ""): p.grad.clone() for name, p in
                 layer.named_parameters()}
        results.append({"y": y, "x": x.grad, **grads})
    ours, theirs = results
    assert ours.keys() == theirs.keys() and "lora_A.weight" in ours
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    assert ours["lora_A.weight"].dtype == FP32 and ours["lora_A.weight"].any()


@pytest.mark.parametrize("training", [True, False])
def test_a_wrapper_takes_over_the_mode_of_its_layer(training):
    layer = LoRALinear(nn.Linear(64, 64).train(training), LoRAConfig(lora_dropout=0.5))
    randomize(layer)
    x = torch.randn(1, 64)
    assert torch.equal(layer(x), layer(x)) is not training


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_starts_uniform_within_one_over_root_of_its_inputs_and_b_zero(dtype):
    layer = LoRALinear(nn.Linear(400, 48, dtype=dtype), LoRAConfig(r=32))
    lora_a, bound = layer.lora_A.weight, 1 / 20
    assert lora_a.shape == (32, 400) and layer.lora_B.weight.shape == (48, 32)
    assert lora_a.dtype == layer.lora_B.weight.dtype == FP32
    assert 0.99 * bound < lora_a.abs().max() <= bound
    assert lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(lora_a.mean().item()) < 0.02 * bound
    assert not layer.lora_B.weight.any()


# Injection


def test_one_seed_gives_pefts_very_adapter(base):
    model, theirs = load_gpt2(base), tiny_gpt2()
    torch.manual_seed(3)
    inject(model, LoRAConfig(target_modules=("c_fc", "c_proj", "c_attn")))
    torch.manual_seed(3)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        target_modules=list(ALL_FOUR), fan_in_fan_out=True))
    ours, theirs = adapter_tensors(model), peft.get_peft_model_state_dict(theirs)
    assert ours.keys() == theirs.keys() and len(ours) == 16
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_new_adapter_changes_no_logit_and_a_trained_one_does(base):
    model = load_gpt2(base)
    expected = model(IDS)
    inject(model, LoRAConfig(target_modules=ALL_FOUR))
    assert torch.equal(model(IDS), expected)
    randomize(model)
    assert relative_difference(model(IDS), expected) > 0.1


def test_only_a_and_b_are_trained(base):
    model = load_gpt2(base).requires_grad_(True)
    inject(model, LoRAConfig(target_modules=("attn.c_proj",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"h.{i}.attn.c_proj.lora_{part}.weight" for i in (0, 1) for part in "AB"}


@pytest.mark.parametrize("targets", [
    ["c_attn"], ["c_proj"], ["attn.c_proj"], ["h.1.mlp.c_fc"], ["transformer.h.0.attn.c_attn"],
    ["c_attn", "c_attn"], ["c_proj", "attn.c_proj"], ["mlp.c_proj", "1.attn.c_attn"],
    ["c_fc", "c_proj", "c_attn"],
])
def test_targets_and_printed_counts_are_pefts(base, targets, capsys):
    model = load_gpt2(base)
    inject(model, LoRAConfig(target_modules=tuple(targets)))
    theirs = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(
        target_modules=targets, fan_in_fan_out=True))
    names = [f"transformer.{name}" for name in lora_layers(model)]
    assert names == theirs.base_model.targeted_module_names
    theirs.print_trainable_parameters()
    assert describe_parameters(model) == capsys.readouterr().out.strip()


def test_c_proj_is_the_attentions_and_the_mlps(base):
    model = load_gpt2(base)
    inject(model, LoRAConfig(target_modules=("c_proj",)))
    assert list(lora_layers(model)) == ["h.0.attn.c_proj", "h.0.mlp.c_proj",
                                        "h.1.attn.c_proj", "h.1.mlp.c_proj"]


@pytest.mark.parametrize(("shape", "line"), [
    ((768, 12, 12),
     "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"),
    ((1024, 24, 16),
     "trainable params: 786,432 || all params: 355,609,600 || trainable%: 0.2212"),
    ((1280, 36, 20),
     "trainable params: 1,474,560 || all params: 775,504,640 || trainable%: 0.1901"),
    ((1600, 48, 25),
     "trainable params: 2,457,600 || all params: 1,560,068,800 || trainable%: 0.1575"),
], ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_counts_of_the_released_sizes(shape, line):
    n_embd, n_layer, n_head = shape
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
        inject(model, LoRAConfig())
    assert describe_parameters(model) == line


REFUSED = [
    (("lm_head",), "tied to wte"),
    (("wte",), "tied to the head"),
    (("transformer.wte",), "tied to the head"),
    (("wpe",), "embedding"),
    (("q_proj",), "'q_proj' is not in the model; it has c_attn, c_fc, c_proj"),
    (("c_attn", "q_proj"), "'q_proj' is not in the model"),
    (("n.c_attn",), "'n.c_attn' is not in the model"),  # a suffix begins after a dot
    (("attn",), "only linear layers"),
    (("ln_f",), "only linear layers"),
    (("",), "only linear layers"),
]


@pytest.mark.parametrize(("config", "reason"), [
    *((LoRAConfig(target_modules=targets), reason) for targets, reason in REFUSED),
    *((LoRAConfig(r=r), rf"rank {r} is outside 1 \.\. 32") for r in (0, -1, 33)),
    (LoRAConfig(r=33, target_modules=("c_fc",)), r"rank 33 is outside 1 \.\. 32"),
])
def test_what_cannot_be_adapted_is_refused_and_the_model_left_alone(base, config, reason):
    model = load_gpt2(base)
    before, expected = dict(model.named_parameters()), model(IDS)
    with pytest.raises(ValueError, match=reason):
        inject(model, config)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    assert all(p.requires_grad for p in after.values()) and torch.equal(model(IDS), expected)


def test_the_largest_rank_is_the_layers_smaller_side(base):
    model = load_gpt2(base)
    inject(model, LoRAConfig(r=32, target_modules=ALL_FOUR))
    sides = (32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)  # of a block's four layers
    assert count_parameters(model)[0] == 2 * 32 * sides


def test_an_adapted_layer_is_not_adapted_again(base):
    model = load_gpt2(base)
    inject(model, LoRAConfig())
    with pytest.raises(ValueError, match="LoRALinear"):
        inject(model, LoRAConfig())


# Training


@pytest.mark.parametrize(("dtype", "autocast"),
                         [(FP32, False), (FP32, True), (BF16, True), (BF16, False), (FP16, False)])
def test_training_moves_a_and_b_alone_and_lowers_the_loss(base, dtype, autocast):
    model = load_gpt2(base).to(dtype)
    torch.manual_seed(0)
    inject(model, LoRAConfig(target_modules=ALL_FOUR))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", BF16) if autocast else nullcontext():
            logits = model(IDS[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[2] < losses[1] < losses[0]
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name
        assert torch.equal(parameter, before[name]) is not trained, name
        assert (parameter.grad is not None) is trained, name
