"""The test vectors agree with stock PEFT, with this project, and with their generator."""

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conformance import vectors
from conformance.vectors.__main__ import TWO_LAYERS, main
from lora import LoRAConfig, inject, make_layer

CASES = [name for name in vectors.cases() if name != TWO_LAYERS]
Settings = Mapping[str, Any]
Tensors = dict[str, Tensor]


def tensors(case: str) -> Tensors:
    return {name: torch.from_numpy(value) for name, value in vectors.tensors(case).items()}


def linear(weight: Tensor, bias: Tensor, layout: str = "(out, in)") -> nn.Module:
    """Return the frozen base: nn.Linear, or transformers' Conv1D for (in, out)."""
    layer = nn.Linear(*weight.T.shape) if layout == "(out, in)" else Conv1D(*weight.T.shape)
    layer.weight = nn.Parameter(weight.clone())
    layer.bias = nn.Parameter(bias.clone())
    return layer.requires_grad_(False)


def peft_layer(settings: Settings, base: nn.Module) -> nn.Module:
    config = peft.LoraConfig(
        target_modules=["0"],
        r=settings["r"],
        lora_alpha=settings["alpha"],
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        fan_in_fan_out=isinstance(base, Conv1D),
    )
    return peft.get_peft_model(nn.Sequential(base), config).base_model.model[0].double()


def peft_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    found = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if layer.lora_magnitude_vector:
        found["m"] = layer.lora_magnitude_vector["default"].weight
    return found


def our_layer(settings: Settings, base: nn.Linear) -> nn.Module:
    config = LoRAConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
    )
    return make_layer(base, config, ["qkv"[i] for i in settings["slices"]]).double()


def our_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    blocks_or_b = getattr(layer.lora_B, "blocks", layer.lora_B.weight)
    found = {"A": layer.lora_A.weight, "B": blocks_or_b}
    if hasattr(layer, "lora_magnitude_vector"):
        found["m"] = layer.lora_magnitude_vector
    return found


class Mask(nn.Module):
    """A dropout with a given mask."""

    def __init__(self, mask: Tensor, p: float):
        super().__init__()
        self.keep, self.p = mask / (1 - p), p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep


def assert_close(value: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        value.detach().view_as(expected), expected, rtol=tolerance, atol=tolerance
    )


@torch.no_grad()
def set_parameters(parameters: Mapping[str, Tensor], expected: Tensors, suffix: str = "") -> None:
    for name, parameter in parameters.items():
        parameter.copy_(expected[name + suffix].view_as(parameter))


def assert_trains_alike(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], expected: Tensors, tolerance: float
) -> None:
    """Compare the output, the gradients and ten steps. A name may end in a layer's number."""
    x = expected["x"].clone().requires_grad_()
    y = model(x)
    assert_close(y, expected["y"], tolerance)
    (y - expected["target"]).square().mean().backward()
    assert_close(x.grad, expected["dx"], tolerance)
    for name, parameter in parameters.items():
        assert_close(parameter.grad, expected["d" + name], tolerance)

    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.01)
    for step, expected_loss in enumerate(expected["losses"]):
        loss = (model(expected["x"]) - expected["target"]).square().mean()
        assert_close(loss, expected_loss, tolerance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, parameter in parameters.items():
            steps = expected[f"{name[0]}_steps{name[1:]}"]
            assert_close(parameter, steps[step], tolerance)


def block_sparse(b: Tensor, slices: list[int]) -> Tensor:
    """Return a whole layer's B (out, slices * r) with the slices' B as blocks."""
    count, width, r = b.shape
    whole = b.new_zeros(3, width, count, r)
    for i, place in enumerate(slices):
        whole[place, :, i] = b[i]
    return whole.reshape(3 * width, count * r)


@pytest.mark.parametrize("case", [case for case in CASES if case != "fused-qv"])
def test_peft_agrees(case):
    settings, expected = vectors.cases()[case], tensors(case)
    layer = peft_layer(settings, linear(expected["W"], expected["b"], settings["layout"]))
    if "mask" in expected:
        layer.lora_dropout["default"] = Mask(expected["mask"], settings["dropout"])
    parameters = peft_parameters(layer)
    set_parameters(parameters, expected)
    assert_trains_alike(layer, parameters, expected, 1e-12)
    set_parameters(parameters, expected)
    layer.merge()
    assert_close(layer.base_layer.weight, expected["merged_W"])


def test_peft_agrees_on_slices_of_a_fused_layer_with_a_block_sparse_b():
    settings, expected = vectors.cases()["fused-qv"], tensors("fused-qv")
    whole = settings | {"r": 2 * settings["r"], "alpha": 2 * settings["alpha"]}
    layer = peft_layer(whole, linear(expected["W"], expected["b"]))
    dense = {"A": expected["A"], "B": block_sparse(expected["B"], settings["slices"])}
    set_parameters(peft_parameters(layer), dense)
    assert_close(layer(expected["x"]), expected["y"])
    layer.merge()
    assert_close(layer.base_layer.weight, expected["merged_W"])


@pytest.mark.parametrize("case", CASES)
def test_this_project_agrees(case):
    settings, expected = vectors.cases()[case], tensors(case)
    if settings["layout"] == "(in, out)":  # this project transposes when it loads a file
        expected |= {name: expected[name].T for name in ("W", "merged_W")}
    layer = our_layer(settings, linear(expected["W"], expected["b"]))
    if "mask" in expected:
        layer.lora_dropout = Mask(expected["mask"], settings["dropout"])
    parameters = our_parameters(layer)
    set_parameters(parameters, expected)
    tolerance = 1e-5 if settings["use_dora"] else 1e-12  # DoRA computes the norm in fp32
    assert_trains_alike(layer, parameters, expected, tolerance)
    set_parameters(parameters, expected)
    layer.merge()  # the sum is in fp32
    assert_close(layer.base_layer.weight, expected["merged_W"], 1e-5)


@pytest.mark.parametrize("whose", ["peft", "ours"])
def test_two_layers_with_their_own_ranks_and_alphas(whose):
    settings, expected = vectors.cases()[TWO_LAYERS]["layers"], tensors(TWO_LAYERS)
    bases = [linear(expected[f"W{i}"], expected[f"b{i}"]) for i in range(2)]
    model = nn.Sequential(bases[0], nn.ReLU(), bases[1])
    patterns = {
        "target_modules": ["0", "2"],
        "lora_dropout": 0.0,
        "rank_pattern": {"0": settings[0]["r"], "2": settings[1]["r"]},
        "alpha_pattern": {"0": settings[0]["alpha"], "2": settings[1]["alpha"]},
    }
    if whose == "peft":
        peft.get_peft_model(model, peft.LoraConfig(**patterns))
    else:
        inject(model, LoRAConfig(**patterns))
    model.double()
    of = peft_parameters if whose == "peft" else our_parameters
    parameters = {f"{k}{i}": p for i in range(2) for k, p in of(model[2 * i]).items()}
    set_parameters(parameters, expected)
    assert_trains_alike(model, parameters, expected, 1e-12)


def test_rounding_to_bf16_is_that_of_pytorch():
    expected = tensors("bf16-base")
    assert torch.equal(expected["merged_W"].bfloat16().double(), expected["merged_W_bf16"])
    assert torch.equal(expected["W"].bfloat16().double(), expected["W"])
    assert not torch.equal(expected["merged_W"], expected["merged_W_bf16"])


def test_the_vectors_are_what_the_command_writes(tmp_path):
    main(["--out", str(tmp_path)])
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {p.name: p.read_bytes() for p in vectors.HERE.glob("*.[js]*")}
    assert written == kept
    assert sum(map(len, kept.values())) < 200_000
