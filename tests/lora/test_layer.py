"""Compare the LoRA layer with PEFT's layer, and with the code of two pages."""

import math
import re
from copy import deepcopy

import pytest
import torch
from torch import nn

from lora.inject import inject
from lora.layer import LoRAConfig, LoRALinear
from lora.slices import SlicedLoRALinear
from tests.helpers import relative_difference
from tests.pairs import output_and_gradients, pair, perturb_alike, randomize
from training.options import ROOT

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SQUARE, WIDE, TALL = (32, 32), (32, 96), (96, 32)
DROPOUT = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.3}
RSLORA = {"r": 4, "lora_alpha": 3, "lora_dropout": 0.0, "use_rslora": True}


def test_the_layer_of_the_readme_is_ours():
    names = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1], names)
    base = nn.Linear(32, 96)
    torch.manual_seed(0)
    theirs = names["LoRALinear"](deepcopy(base))
    ours = LoRALinear(base, LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.0))
    x = torch.randn(5, 32)
    assert torch.equal(theirs(x), base(x))  # B is zero
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < theirs.A.abs().max() <= bound  # the range of `LoRALinear`

    with torch.no_grad():
        ours.lora_A.weight.copy_(theirs.A)
        ours.lora_B.weight.normal_()
        theirs.B.copy_(ours.lora_B.weight)
    assert relative_difference(theirs(x), ours(x).double()) < 1e-6
    assert not torch.allclose(theirs(x), base(x))
    trained = [name for name, p in theirs.named_parameters() if p.requires_grad]
    assert trained == ["A", "B"]


def test_the_pages_forward_is_the_layers():
    names = {}
    page = (ROOT / "docs" / "lora.md").read_text()
    first, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model = nn.Sequential(nn.Linear(32, 96))
    inject(model, LoRAConfig(target_modules="all-linear"))
    layer = model[0].eval()
    randomize(model)
    exec(first, names)
    x = torch.randn(5, 32)
    assert torch.equal(names["forward"](layer, x), layer(x))
    assert not torch.allclose(layer(x), layer.base_layer(x))


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


def test_a_wrapper_takes_over_the_mode_of_its_layer():
    layer = LoRALinear(nn.Linear(64, 64).eval(), LoRAConfig(lora_dropout=0.5))
    randomize(layer)
    x = torch.randn(1, 64)
    assert torch.equal(layer(x), layer(x))


def test_a_wrapper_lies_on_the_device_of_its_layer():
    sliced = SlicedLoRALinear(nn.Linear(48, 48, device="meta"), LoRAConfig(r=4), {"q"})
    assert all(parameter.is_meta for parameter in sliced.parameters())
