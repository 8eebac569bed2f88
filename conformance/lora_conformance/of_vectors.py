"""Compare a PyTorch layer with a test vector."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_conformance import vectors
from lora_conformance.bench import Implementation, expect
from lora_conformance.models import InOutLinear, expect_same, others, trained


class Case(NamedTuple):
    """A layer with the W, b, A, B and m of a test vector, and the vector's tensors."""

    layer: nn.Module
    parameters: dict[str, Any]
    expected: dict[str, Tensor]


def of_vector(lora: Implementation, case: str, **options: bool) -> Case:
    settings = vectors.cases()[case]
    expected = {name: torch.from_numpy(value) for name, value in vectors.tensors(case).items()}
    weight = expected["W"].T if settings["layout"] == "(in, out)" else expected["W"]
    in_out = options.get("fan_in_fan_out")
    base: Any = InOutLinear(*weight.T.shape) if in_out else nn.Linear(*weight.T.shape)
    with torch.no_grad():
        base.weight.copy_(weight.T if in_out else weight)
        base.bias.copy_(expected["b"])
    layer = lora.wrap(base, settings["r"], settings["alpha"], 0.0, **options).double()
    a, b = lora.factors(layer)
    parameters = {"A": a, "B": b}
    if options.get("use_dora"):
        [parameters["m"]] = others(layer, a, b)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(fitted(expected[name], parameter))
    return Case(layer, parameters, expected)


def expect_output(lora: Implementation, case: str, tolerance: float, **options: bool) -> None:
    layer, _, expected = of_vector(lora, case, **options)
    expect_same(layer(expected["x"]), expected["y"], f"the output of {case}", tolerance)


def expect_vectors(lora: Implementation, case: str, tolerance: float, **options: bool) -> None:
    """Compare output, gradients and ten steps with a test vector."""
    layer, parameters, expected = of_vector(lora, case, **options)

    def loss(x: Tensor) -> Tensor:
        return (layer(x) - expected["target"]).square().mean()

    expect_same(layer(expected["x"]), expected["y"], "the output", tolerance)
    x = expected["x"].clone().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    expect_same(x.grad, expected["dx"], "the gradient of x", tolerance)
    for name, parameter in parameters.items():
        expect(parameter.grad is not None, f"{name} has no gradient")
        gradient = fitted(expected["d" + name], parameter)
        expect_same(parameter.grad, gradient, f"the gradient of {name}", tolerance)

    optimizer = torch.optim.AdamW(trained(layer), lr=0.01, weight_decay=0.01)
    for step, expected_loss in enumerate(expected["losses"]):
        optimizer.zero_grad()
        found = loss(expected["x"])
        expect_same(found, expected_loss, f"the loss of step {step + 1}", tolerance)
        found.backward()
        optimizer.step()
    for name, parameter in parameters.items():
        final = fitted(expected[f"{name}_steps"][-1], parameter)
        expect_same(parameter, final, f"{name} after ten steps", tolerance)


def fitted(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor in the orientation of an implementation's parameter."""
    same = tensor.numel() != parameter.numel() or tensor.shape[0] == parameter.shape[0]
    return (tensor if same else tensor.T).reshape(parameter.shape)
