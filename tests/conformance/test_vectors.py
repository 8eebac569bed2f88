"""The test vectors agree with stock PEFT, with this project, and with their generator."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import jsonschema
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from generators.derive import NF4_LEVELS, STEPS, adapted_rows
from generators.vectors import CASES as LAYERS
from generators.vectors import EXPERTS, SUMS, TWO_LAYERS, main
from lora import LoRAConfig, inject, make_layer
from lora.quantised import nearest, nf4_levels, scaled_blocks
from lora_conformance import vectors
from lora_conformance.compare import off_by

FUSED = [name for name, settings in LAYERS.items() if settings["slices"]]
CASES = [name for name in LAYERS if "rows" not in LAYERS[name]]  # this project slices thirds
Settings = Mapping[str, Any]
Tensors = dict[str, Tensor]


def tensors(case: str) -> Tensors:
    return {name: torch.from_numpy(value) for name, value in vectors.tensors(case).items()}


def linear(weight: Tensor, bias: Tensor | None, layout: str = "(out, in)") -> nn.Module:
    """Return the frozen base: nn.Linear, or transformers' Conv1D for (in, out)."""
    layer = nn.Linear(*weight.T.shape) if layout == "(out, in)" else Conv1D(*weight.T.shape)
    layer.weight = nn.Parameter(weight.clone())
    layer.bias = None if bias is None else nn.Parameter(bias.clone())
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
            if step >= STEPS - len(steps):  # large cases have only the last step
                assert_close(parameter, steps[step - STEPS], tolerance)


def block_sparse(b: Tensor, rows: list[list[int]], fan_out: int) -> Tensor:
    """Return a whole layer's B (out, slices * r) with the B of each slice as a block."""
    r = b.size(-1)
    whole = b.new_zeros(fan_out, len(rows) * r)
    for i, (own, block) in enumerate(
        zip(rows, b.reshape(-1, r).split([len(own) for own in rows]), strict=True)
    ):
        whole[own, i * r : (i + 1) * r] = block
    return whole


@pytest.mark.parametrize("case", [case for case in LAYERS if case not in FUSED])
def test_peft_agrees(case):
    settings, expected = vectors.cases()[case], tensors(case)
    layer = peft_layer(settings, linear(expected["W"], expected.get("b"), settings["layout"]))
    if "mask" in expected:
        layer.lora_dropout["default"] = Mask(expected["mask"], settings["dropout"])
    parameters = peft_parameters(layer)
    set_parameters(parameters, expected)
    assert_trains_alike(layer, parameters, expected, 1e-12)
    set_parameters(parameters, expected)
    layer.merge()
    assert_close(layer.base_layer.weight, expected["merged_W"])


@pytest.mark.parametrize("case", FUSED)
def test_peft_agrees_on_slices_of_a_fused_layer_with_a_block_sparse_b(case):
    settings, expected = vectors.cases()[case], tensors(case)
    rows = adapted_rows(settings)
    n = len(rows)
    whole = settings | {"r": n * settings["r"], "alpha": n * settings["alpha"]}
    layer = peft_layer(whole, linear(expected["W"], expected.get("b")))
    b = block_sparse(expected["B"], rows, settings["out"])
    parameters = peft_parameters(layer)
    set_parameters(parameters, {"A": expected["A"], "B": b})
    x = expected["x"].clone().requires_grad_()
    y = layer(x)
    assert_close(y, expected["y"])
    (y - expected["target"]).square().mean().backward()
    assert_close(x.grad, expected["dx"])
    assert_close(parameters["A"].grad, expected["dA"])
    gradient = block_sparse(expected["dB"], rows, settings["out"])
    assert_close(parameters["B"].grad * (gradient != 0), gradient)
    layer.merge()
    assert_close(layer.base_layer.weight, expected["merged_W"])


class Experts(nn.Module):
    """A mixture of experts with one 3-D weight (experts, out, in), that gives every expert x."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ni->eno", self.weight, x)


def test_peft_agrees_on_the_factors_of_experts_and_another_order_differs():
    settings, expected = vectors.cases()[EXPERTS], tensors(EXPERTS)
    model = nn.Sequential(Experts(expected["W"]))
    config = peft.LoraConfig(
        target_modules=[],
        target_parameters=["0.weight"],
        r=settings["r"],
        lora_alpha=settings["alpha"],
    )
    adapted = peft.get_peft_model(model, config).double()
    layer = adapted.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    set_parameters({"A_peft": a, "B_peft": b}, expected)
    x = expected["x"].clone().requires_grad_()
    y = adapted(x)
    assert_close(y, expected["y"])
    (y - expected["target"]).square().mean().backward()
    assert_close(x.grad, expected["dx"])
    assert_close(a.grad, expected["dA"].flatten(0, 1))
    assert_close(b.grad, expected["dB"].permute(1, 2, 0).flatten(1))
    adapted.merge_adapter()
    assert_close(layer.get_param(), expected["merged_W"])


def test_another_order_of_the_factors_of_experts_has_another_product():
    settings, t = vectors.cases()[EXPERTS], tensors(EXPERTS)
    n, r = settings["experts"], settings["r"]
    a = t["A_peft"].view(n, r, -1), t["A_peft"].view(r, n, -1).transpose(0, 1)
    b = t["B_peft"].view(-1, r, n).permute(2, 0, 1), t["B_peft"].view(-1, n, r).transpose(0, 1)
    update = t["merged_W"] - t["W"]
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        product = settings["alpha"] / r * b[j] @ a[i]
        assert torch.allclose(product, update) == (i == j == 0)


@pytest.mark.parametrize("case", SUMS)
def test_peft_agrees_on_each_adapter_of_a_sum(case):
    settings, expected = vectors.cases()[case], tensors(case)
    total = expected["W"].clone()
    for i, (one, weight) in enumerate(zip(settings["adapters"], settings["weights"], strict=True)):
        layer = peft_layer(one, linear(expected["W"], expected.get("b")))
        set_parameters(peft_parameters(layer), expected, str(i))
        layer.merge()
        total += weight * (layer.base_layer.weight - expected["W"])
    assert_close(total, expected["merged_W"])
    assert_close(expected["x"] @ total.T + expected["b"], expected["y"])


@pytest.mark.parametrize("case", CASES)
def test_this_project_agrees(case):
    settings, expected = vectors.cases()[case], tensors(case)
    if settings["layout"] == "(in, out)":  # this project transposes when it loads a file
        expected |= {name: expected[name].T for name in ("W", "merged_W")}
    layer = our_layer(settings, linear(expected["W"], expected.get("b")))
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


def peft_results(case: str, dtype: torch.dtype) -> Tensors:
    """Return the results of PEFT's layer in this precision."""
    settings, t = vectors.cases()[case], tensors(case)
    layer = peft_layer(settings, linear(t["W"], t.get("b"), settings["layout"])).to(dtype)
    if "mask" in t:
        layer.lora_dropout["default"] = Mask(t["mask"].to(dtype), settings["dropout"])
    parameters = peft_parameters(layer)
    set_parameters(parameters, t)
    x = t["x"].to(dtype, copy=True).requires_grad_()
    y = layer(x)
    (y - t["target"].to(dtype)).square().mean().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": parameter.grad.clone() for name, parameter in parameters.items()}
    layer.merge()
    return found | {"merged_W": layer.base_layer.weight.detach()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F64", torch.float64), ("F32", torch.float32), ("F16", torch.half), ("BF16", torch.bfloat16)],
)
def test_peft_stays_within_the_tolerance_of_each_precision(name, dtype):
    errors = {}
    for case in [case for case in CASES if not vectors.cases()[case]["slices"]]:
        expected = vectors.results(case)
        for result, value in peft_results(case, dtype).items():
            wanted = expected[result]
            error = off_by(value.double().view(wanted.shape).numpy(), wanted)
            errors[f"{case}/{result}"] = error / vectors.tolerance(result, name)
    assert max(errors.values()) < 0.6, errors


def test_rounding_to_bf16_is_that_of_pytorch():
    expected = tensors("bf16-base")
    assert torch.equal(expected["merged_W"].bfloat16().double(), expected["merged_W_bf16"])
    assert torch.equal(expected["W"].bfloat16().double(), expected["W"])
    assert not torch.equal(expected["merged_W"], expected["merged_W_bf16"])


def test_the_nf4_of_the_vectors_is_that_of_this_project():
    expected = tensors("nf4-base")
    assert torch.equal(torch.from_numpy(NF4_LEVELS).float(), nf4_levels())
    for name, of in (("W", "W"), ("merged_W_nf4", "merged_W")):
        blocks, absmax = scaled_blocks(expected[of], 64)
        codes = nearest(blocks, nf4_levels()).int()
        rounded = (nf4_levels()[codes].double() * absmax.double()[:, None]).view_as(expected[of])
        assert_close(expected[name], rounded, 1e-6)
    update = expected["merged_W"] - expected["W"]
    kept = ((expected["merged_W_nf4"] - expected["W"]) * update).sum() / update.square().sum()
    assert kept < 0.5  # so the case shows what such a merge loses


def test_the_vectors_are_what_the_command_writes(tmp_path):
    main(["--out", str(tmp_path)])
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in vectors.HERE.glob("*.safetensors")}
    assert written == kept | {"vectors.json": vectors.INDEX.read_bytes()}
    assert sum(map(len, kept.values())) < 600_000
    hashes = {name: sha256(content).hexdigest() for name, content in kept.items()}
    assert vectors.index()["sha256"] == hashes


def test_each_tensor_is_an_input_or_a_result():
    index = vectors.index()
    names = {name for case in index["cases"] for name in vectors.tensors(case)}
    known = {*index["inputs"], *index["results"]}
    assert {name if name in known else name[:-1] for name in names} == known


def test_the_index_names_the_cases_that_store_only_the_last_step():
    text = vectors.index()["results"]["A_steps"]
    for case in LAYERS:
        assert (case in text.replace(",", "").split()) == (len(tensors(case)["A_steps"]) == 1)


SCHEMA = json.loads((vectors.HERE / "schema.json").read_text())


def test_the_schema_accepts_the_index():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(vectors.index(), SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("formulas"),
        lambda index: index.update(extra=1),
        lambda index: index.update(version="1.0"),
        lambda index: index["cases"]["lora"].pop("alpha"),
        lambda index: index["cases"]["lora"].update(r=0),
        lambda index: index["cases"]["lora"].update(lora_alpha=6),
        lambda index: index["cases"][TWO_LAYERS]["layers"].pop(),
        lambda index: index["tolerances"].pop("F32"),
        lambda index: index["sha256"].update({"lora.safetensors": "0"}),
    ],
)
def test_the_schema_refuses_a_wrong_index(change):
    index = vectors.index()
    change(index)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(index, SCHEMA, jsonschema.Draft202012Validator)
