"""Checks of a DoRA layer."""

from copy import deepcopy

import torch
from torch import nn

from lora_conformance.bench import Implementation, expect, mathematics, robustness
from lora_conformance.checks.layer import expect_changes_nothing, expect_drops
from lora_conformance.models import DORA, IN_OUT, RSLORA, SLICES, Model, expect_same, others
from lora_conformance.of_vectors import expect_output, expect_vectors


@mathematics(
    "The magnitude is the norm of other weights than W, such as a random layer.",
    "mlx-examples #832",
)
def new_dora_adapter_changes_nothing(lora: Implementation) -> None:
    """A new DoRA adapter changes no output, because its magnitude is the norm of W."""
    expect_changes_nothing(lora, DORA, DORA | RSLORA, DORA | IN_OUT, DORA | SLICES)
    if lora.has("inject"):
        base = Model()
        model = deepcopy(base)
        lora.inject(model, ["proj"], 4, 12, use_dora=True)
        ids = torch.arange(17)[None]
        expect_same(model(ids), base(ids), "the output of a model", 1e-5)


@mathematics("DoRA ignores dropout, or drops x twice.")
def dora_dropout(lora: Implementation) -> None:
    """With use_dora, dropout of 0.2 removes a fifth, and the mean update is the whole update."""
    expect_drops(lora, use_dora=True)


@mathematics("DoRA's norm is taken along the wrong axis of W + s B A.", "peft #1588")
def dora_is_m_over_the_norm(lora: Implementation) -> None:
    """With use_dora, the output is m / ||V|| V x + b, with V = W + s B A and the norms of rows."""
    for case in ("dora-in-out-square", "dora"):
        expect_output(lora, case, 1e-4, use_dora=True)


@mathematics("DoRA has the scaling of LoRA, alpha / r, although it is told to use rsLoRA.")
def dora_with_rslora(lora: Implementation) -> None:
    """With use_dora and use_rslora, s in DoRA's formula is alpha / sqrt(r)."""
    expect_output(lora, "dora-rslora", 1e-4, use_dora=True, use_rslora=True)


@mathematics(
    "DoRA's norm is taken along the rows of W (in, out). A square W hides this.", "peft #1588"
)
def dora_on_in_out_weights(lora: Implementation) -> None:
    """With use_dora and fan_in_fan_out, the output is right, also for a square W."""
    for case in ("dora-in-out-square", "dora"):
        expect_output(lora, case, 1e-4, use_dora=True, fan_in_fan_out=True)


@robustness("DoRA's gradients go through the norm, which the paper treats as a constant.")
def dora_ten_steps(lora: Implementation) -> None:
    """With use_dora, gradients and ten steps equal the test vectors, with the norm a constant."""
    for case in ("dora-in-out-square", "dora"):
        expect_vectors(lora, case, 1e-4, use_dora=True)


@robustness("On a bf16 base, DoRA's magnitude has eight bits, so steps of training are lost.")
def dora_magnitudes_stay_fp32(lora: Implementation) -> None:
    """On a bf16 base, DoRA's magnitude is the fp32 norm of W."""
    base = nn.Linear(12, 20, bias=False).bfloat16()
    norms = base.weight.detach().double().norm(dim=1)
    layer = lora.wrap(base, 4, 12, 0.0, use_dora=True)
    [magnitude] = others(layer, *lora.factors(layer))
    expect(magnitude.dtype is torch.float32, f"the magnitude is {magnitude.dtype}")
    expect_same(magnitude.flatten(), norms, "the magnitude", 1e-5)
