"""Compare the LoRA layer with PEFT's layer."""

import pytest
import torch
from torch import nn

from lora.config import LoRAConfig
from lora.layer import LoRALinear
from lora.quantised import NF4Linear
from lora.slices import SlicedLoRALinear
from tests.helpers import relative_difference
from tests.pairs import output_and_gradients, pair, perturb_alike, randomize

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SQUARE, WIDE, TALL = (32, 32), (32, 96), (96, 32)
DROPOUT = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.3}
RSLORA = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": True}


@pytest.mark.parametrize(
    ("dtype", "autocast", "shape", "config"),
    [
        (FP32, False, WIDE, RSLORA),
        (FP32, False, TALL, DROPOUT),
        (FP32, True, WIDE, DROPOUT),
        (BF16, False, SQUARE, DROPOUT),
        (FP16, False, WIDE, DROPOUT),
    ],
)
def test_outputs_and_gradients_are_pefts_to_the_last_bit(dtype, autocast, shape, config):
    x = torch.linspace(-1, 1, 7 * shape[0]).view(7, shape[0]).to(dtype)
    ours, theirs, _ = pair("lora", shape, dtype, **config)
    perturb_alike(ours, theirs)
    ours = output_and_gradients(ours.requires_grad_(True), x, autocast)
    theirs = output_and_gradients(theirs.requires_grad_(True), x, autocast)
    assert ours.keys() == theirs.keys() and "lora_A.weight" in ours
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    assert ours["lora_A.weight"].dtype == FP32 and ours["lora_A.weight"].any()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_layer_in_fp64_runs_under_autocast(kind):
    ours, theirs, _ = pair(kind, WIDE, torch.float64, lora_dropout=0.3)
    perturb_alike(ours, theirs)
    x = torch.randn(7, 32, dtype=torch.float64)
    ours, theirs = (output_and_gradients(layer, x, True) for layer in (ours, theirs))
    for name, value in ours.items():
        assert relative_difference(value, theirs[name]) < 4 * torch.finfo(BF16).eps, name


def test_a_wrapper_takes_over_the_mode_of_its_layer():
    layer = LoRALinear(nn.Linear(64, 64).eval(), LoRAConfig(lora_dropout=0.5))
    randomize(layer)
    x = torch.randn(1, 64)
    assert torch.equal(layer(x), layer(x))


def test_a_wrapper_lies_on_the_device_of_its_layer():
    sliced = SlicedLoRALinear(nn.Linear(48, 48, device="meta"), LoRAConfig(r=4), {"q"})
    assert all(parameter.is_meta for parameter in sliced.parameters())
    quantised = NF4Linear(nn.Linear(64, 64, device="meta"))
    assert all(buffer.is_meta for buffer in quantised.buffers())


def test_the_cpus_generator_draws_a_whatever_the_device_of_the_layer():
    states = []
    for layer in (nn.Linear(8, 8), nn.Linear(8, 8, device="meta")):
        torch.manual_seed(0)
        LoRALinear(layer, LoRAConfig(r=4))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
