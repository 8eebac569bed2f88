"""NF4 and int8 layers against bitsandbytes on a CPU, and steps against PEFT's 4-bit model."""

import peft
import pytest
import torch
import transformers
from torch import nn

from lora.config import LoRAConfig
from lora.inject import inject
from lora.layer import LoRALinear
from lora.parameters import count_parameters
from lora.quantised import (
    LAYERS,
    Int8Linear,
    NF4Linear,
    dequantise,
    nf4_levels,
    quantise,
    scale_levels,
)
from storage.weights import load_gpt2
from tests.helpers import relative_difference, tiny_gpt2_directory
from tests.models import CASES, make, output
from tests.pairs import IDS, losses_of_steps, parameters

FP32, BF16 = torch.float32, torch.bfloat16
# bitsandbytes 0.50 on a CPU dequantises widths of 32, 96, 160, ... wrongly: avoid these.
SHAPES = [(33, 77), (499, 499), (1, 3)]  # one block of scales, many, and a single scale


def linear(shape: tuple[int, int]) -> nn.Linear:
    """Make a layer with large rows, small rows, an outlier and a zero."""
    torch.manual_seed(0)
    out, width = shape
    layer = nn.Linear(width, out)
    layer.weight.data = torch.randn(out, width) * torch.rand(out, 1)
    layer.weight.data[0, 0] = 9
    layer.weight.data[-1, -1] = 0
    return layer


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


@pytest.fixture
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(FP32)


@pytest.mark.parametrize("default_dtype", [FP32, BF16, torch.float64], indirect=True)
def test_the_levels_are_bitsandbytes_whatever_the_default_dtype(bnb, default_dtype):
    ours = (nf4_levels(), scale_levels())
    torch.set_default_dtype(FP32)
    assert torch.equal(ours[0], bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(ours[1], bnb.create_dynamic_map())
    assert ours[0][7] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_weights_are_bitsandbytes_to_the_bit(bnb, shape):
    layer = linear(shape)
    codes, state = bnb.quantize_4bit(
        layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    ours = NF4Linear(layer)
    assert torch.equal(ours.codes.flatten()[: codes.numel()], codes.flatten())
    if len(ours.absmax) > 1:  # minus the mean, a single scale is 0, and every code gives 0
        assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.scales, state.state2.absmax)
    assert torch.equal(ours.mean, state.offset)
    for dtype in (FP32, BF16):
        state.dtype = dtype
        assert torch.equal(ours.dequantised(dtype), bnb.dequantize_4bit(codes, state))
    assert ours.weight[-1, -1] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_bitsandbytes_to_the_bit(bnb, shape):
    layer = linear(shape)
    codes, absmax, _ = bnb.int8_vectorwise_quant(layer.weight.data)
    ours = Int8Linear(layer)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(ours.weight, bnb.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_autograds_through_the_dequantised_weight(kind, autocast, monkeypatch):
    quantised = LAYERS[kind](linear((33, 77)))
    plain = quantised.to_linear().requires_grad_(False)
    asked = []
    decode = LAYERS[kind].dequantised
    monkeypatch.setattr(
        LAYERS[kind],
        "dequantised",
        lambda layer, dtype: asked.append(dtype) or decode(layer, dtype),
    )
    config = LoRAConfig(r=4, lora_dropout=0.3)
    results = []
    for base_layer in (quantised, plain):
        torch.manual_seed(1)
        layer = LoRALinear(base_layer, config)
        nn.init.normal_(layer.lora_B.weight)
        x = torch.randn(2, 3, 77, requires_grad=True)
        with torch.autocast("cpu", BF16, enabled=autocast):
            y = layer(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
        assert expected.abs().max() > 0
    assert asked == 2 * [y.dtype]  # W is decoded in forward and backward only, in this precision


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(kind):
    layer = LAYERS[kind](linear((256, 512)))
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        y = layer(torch.randn(2, 512, requires_grad=True))
    kept += [x.numel() for x in vars(y.grad_fn).values() if isinstance(x, torch.Tensor)]
    assert sum(kept) <= 2 * 512
    stored = sum(b.nbytes for n, b in layer.named_buffers() if n in layer.state_dict())
    assert stored <= 256 * 512 * (1.01 if kind == "int8" else 4.6 / 8)


def test_a_cast_leaves_scales_in_fp32():
    for kind in LAYERS.values():
        layer = kind(linear((33, 77)))
        before = layer.weight
        layer.to(BF16)
        assert layer.bias.dtype == BF16
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64])
def test_a_dequantised_model_has_its_dtype_and_runs(dtype):
    case = CASES["t5"]
    model = make(case)
    quantise(model, "int8")
    dequantise(model.to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert not wo.weight.requires_grad  # as before, so an adapter stays all that is trained
    assert output(model, case).dtype == dtype


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    sizes = {"n_embd": 64, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), **sizes)[0]


def stock_4bit(base):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=FP32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, device_map="cpu", dtype=FP32
    )


def test_twenty_steps_are_pefts_on_bitsandbytes_4_bit_model(base):
    fields = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_dora": True}
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], **fields)
    theirs = peft.get_peft_model(stock_4bit(base), config)
    ours = load_gpt2(base)
    quantise(ours, "nf4")
    inject(ours, LoRAConfig(target_modules=("c_attn", "c_fc"), **fields))
    assert all(isinstance(block.mlp.c_proj, NF4Linear) for block in ours.h)  # all linear layers
    theirs_by_name = {
        name.removeprefix("base_model.model.transformer."): p
        for name, p in parameters(theirs).items()
    }
    with torch.no_grad():
        for name, parameter in parameters(ours).items():
            parameter.copy_(theirs_by_name[name])
    ours_losses = losses_of_steps(ours.train(), IDS, 20)
    theirs_losses = losses_of_steps(theirs.train(), IDS, 20)
    assert max(abs(a - b) for a, b in zip(ours_losses, theirs_losses, strict=True)) < 1e-5
    assert ours_losses[-1] < ours_losses[0] - 0.1
    for name, parameter in parameters(ours).items():
        assert relative_difference(parameter, theirs_by_name[name]) < 1e-4, name


def test_a_quantised_base_is_the_same_in_every_precision_and_counts_the_same(base):
    plain = load_gpt2(base)
    models = [load_gpt2(base, dtype, NF4Linear) for dtype in (FP32, BF16)]
    for one, other in zip(*(model.named_buffers() for model in models), strict=True):
        assert torch.equal(one[1], other[1]), one[0]
    assert models[1].h[0].mlp.c_fc.bias.dtype == models[1].wte.weight.dtype == BF16
    dequantise(models[0])
    for (name, p), (_, q) in zip(
        plain.named_parameters(), models[0].named_parameters(), strict=True
    ):
        inside = name.endswith("weight") and ".ln_" not in name and name.startswith("h.")
        assert torch.equal(p, q) != inside, name
        assert not inside or 0.02 < relative_difference(q, p) < 0.2
    counts = [count_parameters(model)[1] for model in (plain, models[1])]
    assert counts[0] == counts[1]
