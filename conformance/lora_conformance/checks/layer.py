"""Checks of one layer in training: start, scale, dropout, gradients, precision."""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_conformance.bench import Implementation, expect, interface, mathematics, robustness
from lora_conformance.models import (
    IN_OUT,
    PLAIN,
    RSLORA,
    SLICES,
    Model,
    Options,
    adapted,
    base_for,
    draw,
    expect_same,
    factors,
    named,
    off_by,
    supported,
    trained,
    weight_of,
)
from lora_conformance.of_vectors import expect_vectors


@mathematics("B starts at random, so training does not start from the base.", "FastVideo #781")
def new_adapter_changes_nothing(lora: Implementation) -> None:
    """A new adapter changes no output, in training or evaluation, at any dropout."""
    expect_changes_nothing(lora, PLAIN, RSLORA, IN_OUT, SLICES, dropout=0.5)


def expect_changes_nothing(lora: Implementation, *kinds: Options, dropout: float = 0.0) -> None:
    x = torch.randn(5, 12)
    for options in supported(lora, *kinds):
        base = base_for(options)
        expected = base(x)
        layer = lora.wrap(deepcopy(base), 4, 12, dropout, **options)
        for mode in (True, False):
            layer.train(mode)
            expect_same(layer(x), expected, f"the output of {named(options)}", 1e-5)


@mathematics(
    "The update is scaled by alpha, and not by alpha / r.",
    "LLMs-from-scratch #821",
    "mlx-vlm #845",
    "minimind #577",
)
def update_is_alpha_over_r(lora: Implementation) -> None:
    """The update is alpha / r * B A x for any r and alpha, with a bias or without."""
    for r, alpha in ((4, 12), (2, 1), (8, 8), (4, 6), (2, 2.5), (3, 10)):
        expect_scaling(lora, r, alpha, alpha / r)
    expect_scaling(lora, 4, 12, 3, bias=False)


@mathematics(
    "An rsLoRA adapter is scaled by alpha / r.",
    "TensorRT-LLM #1668",
    "vLLM #6909",
    "SGLang #40835",
)
def rslora_is_alpha_over_root_r(lora: Implementation) -> None:
    """With use_rslora the update is alpha / sqrt(r) * B A x."""
    for r, alpha in ((4, 12), (3, 10)):
        expect_scaling(lora, r, alpha, alpha / r**0.5, use_rslora=True)


def expect_scaling(
    lora: Implementation, r: int, alpha: float, scaling: float, **options: bool
) -> None:
    one = adapted(lora, r=r, alpha=alpha, **options)
    where = f"r {r}, alpha {alpha}" + (", no bias" if one.base.bias is None else "")
    expect(
        abs(one.scaling - scaling) < 1e-6,
        f"{where}: the factor is {one.scaling:.3g}, not {scaling:.3g}",
    )
    expect_same(weight_of(one.layer, 12), one.weight(), "the weight")


@interface("A is drawn for a fan-in of r, which is too wide, or A and B are both zero.")
def start_of_a(lora: Implementation) -> None:
    """A is random. The width of A is about 1 / sqrt(in), and does not depend on the rank."""
    widths = {}
    for r in (2, 8, 32):
        a, _ = factors(lora, lora.wrap(nn.Linear(256, 64), r, 16, 0.0), r)
        widths[r] = a.detach().std().item() * 256**0.5
    seen = ", ".join(f"{width:.2f} at r {r}" for r, width in widths.items())
    expect(
        all(0.1 < width < 3 for width in widths.values()),
        f"A's standard deviation, in units of 1 / sqrt(in), is {seen}",
    )
    expect(max(widths.values()) < 1.4 * min(widths.values()), f"A's width is {seen}")


@robustness("Layers or slices share one A, or draw A from the same seed.")
def each_layer_draws_an_a(lora: Implementation) -> None:
    """Every layer and slice has a separate A, and two of them differ at the start."""
    layers = [lora.wrap(nn.Linear(12, 20), 4, 12, 0.0) for _ in range(2)]
    starts = {"layers": [lora.factors(layer)[0] for layer in layers]}
    if lora.has("inject"):
        model = Model()
        lora.inject(model, ["proj"], 4, 12)
        starts["blocks"] = [lora.factors(block.proj)[0] for block in model.blocks()]
    if SLICES in supported(lora, PLAIN, SLICES):
        a, _ = lora.factors(lora.wrap(nn.Linear(12, 24), 4, 12, 0.0, **SLICES))
        starts["slices"] = list(a.reshape(-1, 12).split(4))
    for what, (first, *rest) in starts.items():
        for other in rest:
            expect(first.data_ptr() != other.data_ptr(), f"two {what} share A")
            expect(off_by(first, other) > 0.1, f"A of two {what} is equal at the start")


@mathematics("The base is not frozen, and is trained with the adapter.")
def base_is_frozen(lora: Implementation) -> None:
    """Only A and B are trained. The base's weight and bias do not move."""
    layer, base, a, b, _ = adapted(lora)
    numbers = sum(p.numel() for p in trained(layer))
    expected = a.numel() + b.numel()
    expect(numbers == expected, f"{numbers} numbers are trained; A and B have {expected}")

    optimizer = torch.optim.AdamW(trained(layer), lr=0.1)
    x = torch.randn(5, 12).double()
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        b.zero_()
    expect_same(layer(x), base(x), "the base's output after a step")


@mathematics("Dropout is never applied, or wrapping begins in evaluation mode.", "torchtune #996")
def dropout_only_in_training(lora: Implementation) -> None:
    """Dropout is random in training and absent in evaluation."""
    layer = lora.wrap(nn.Linear(12, 20), 4, 12, 0.5)  # stays in training, as nn.Linear begins
    draw(*lora.factors(layer))
    x = torch.randn(5, 12)
    for when in ("after wrapping", "after eval() and train()"):
        expect(off_by(layer(x), layer(x)) > 0.01, f"{when}, two passes have equal outputs")
        layer.eval()
        expect_same(layer(x), layer(x), "a second output in evaluation")
        layer.train()


@mathematics("Dropout removes elements of A x, or the tokens of a batch share one mask.")
def dropout_before_a(lora: Implementation) -> None:
    """Dropout removes elements of x, before A, and draws them for each token."""
    layer, base, _, b, _ = adapted(lora, r=1, dropout=0.5)
    for shape in ((200,), (2, 100), (100, 2)):
        x = torch.randn(1, 12).double().expand(*shape, 12)
        sizes = ((layer(x) - base(x)) @ b).round(decimals=6)  # proportional to A dropout(x)
        different = len(sizes.unique())
        expect(different > 120, f"200 equal tokens in {shape} have {different} different updates")


@mathematics("Dropout keeps a share of p, divides by p, or does not divide by 1 - p.")
def dropout_is_unbiased(lora: Implementation) -> None:
    """Dropout of 0.2 removes a fifth of the elements. The mean update is the whole update."""
    expect_drops(lora)


def expect_drops(lora: Implementation, **options: bool) -> None:
    layer, base, *_ = adapted(lora, r=1, dropout=0.2, **options)
    x = torch.zeros(4000, 12).double()
    x[:, 0] = 1  # dropout removes this element, or not
    updates = layer(x) - base(x)
    layer.eval()
    expected = (layer(x[:1]) - base(x[:1]))[0]
    sizes, counts = updates.norm(dim=1).round(decimals=4).unique(return_counts=True)
    expect(len(sizes) == 2, f"with one element in x there are {len(sizes)} updates, not 2")
    removed = counts[0].item() / len(x)  # the smaller update
    expect(abs(removed - 0.2) < 0.03, f"dropout=0.2 removes {removed:.0%} of the elements")
    expect_same(updates.mean(0), expected, "the mean update in training", 0.05)


@mathematics("The gradient of x misses the mask, or misses W.", "fms-acceleration #97")
def gradient_of_x(lora: Implementation) -> None:
    """The gradient of x goes through W, and through the mask that the forward pass used."""
    layer = adapted(lora, dropout=0.5).layer
    x, h, g = (torch.randn(5, n).double() for n in (12, 12, 20))

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask each time; y is then linear in x
        return (layer(x) * g).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    expect_same((leaf.grad * h).sum(), loss(x + h) - loss(x), "the derivative along a direction")


@mathematics(
    "A backward written by hand forgets the scaling, or takes x for dropout(x).", "axolotl #3806"
)
def gradients_of_a_and_b(lora: Implementation) -> None:
    """The gradients of A and B have the scaling, and the mask that the forward pass used."""
    layer = adapted(lora, dropout=0.5).layer
    x, g = torch.randn(5, 12).double(), torch.randn(5, 20).double()

    def loss() -> Tensor:
        torch.manual_seed(1)  # the same mask each time; y is then linear in A, and in B
        return (layer(x) * g).sum()

    loss().backward()
    for name, factor in zip("AB", lora.factors(layer), strict=True):
        expect(factor.grad is not None, f"{name} has no gradient")
        with torch.no_grad():
            before = loss()
            factor += factor.grad
            change = loss() - before
            factor -= factor.grad
        expect_same(factor.grad.square().sum(), change, f"the gradient of {name}, along itself,")


@mathematics("A is frozen, a gradient is detached, or a weight of the base is trained.")
def ten_steps(lora: Implementation) -> None:
    """Output, gradients and ten steps of AdamW equal the test vectors, in fp64."""
    expect_vectors(lora, "lora-r1-alpha1", 1e-9)


@mathematics("The update is skipped while B is zero, so B has no gradient and stays zero.")
def a_new_adapter_learns(lora: Implementation) -> None:
    """At the start, where the update is zero, A or B has a gradient."""
    layer = lora.wrap(nn.Linear(12, 20), 4, 12, 0.0)
    y = layer(torch.randn(5, 12))
    found = torch.autograd.grad(y.sum(), trained(layer), allow_unused=True) if y.grad_fn else ()
    moves = any(gradient is not None and gradient.any() for gradient in found)
    expect(moves, "A and B of a new layer have no gradient")


@robustness("x is flattened by a view, or split at fixed dimensions.")
def any_input_shape(lora: Implementation) -> None:
    """x may be empty, one token, of any number of dimensions, or not contiguous."""
    layer = adapted(lora).layer
    weight = weight_of(layer, 12)
    shift = layer(torch.zeros(1, 12).double())[0].detach()
    inputs = [torch.randn(*shape, 12).double() for shape in ((0,), (2, 0), (), (1, 1), (2, 3, 4))]
    inputs += [torch.randn(12, 5).double().T, torch.randn(3, 12, 4).double().mT]
    for x in inputs:
        expect_same(layer(x), x @ weight.T + shift, f"the output for {tuple(x.shape)}")


@robustness(
    "A and B get the base's half precision, which GradScaler refuses, or are cast to it.",
    "peft #1249",
)
def factors_stay_fp32(lora: Implementation) -> None:
    """On a bf16 base, A and B are fp32, and so is B A x until it is added."""
    base = nn.Linear(12, 20, bias=False).bfloat16()
    base.weight.data.zero_()
    layer = lora.wrap(base, 4, 12, 0.0)
    a, b = factors(lora, layer, 4)
    kinds = {str(p.dtype).removeprefix("torch.") for p in (a, b)}
    expect(kinds == {"float32"}, f"A and B are {', '.join(kinds)}")
    draw(a, b)
    x = torch.randn(50, 12).bfloat16()
    exact = adapted(lora, bias=False).scaling * (x.double() @ a.double().T @ b.double().T)
    rounding = 2.0**-9 * exact.abs() + 1e-5
    worst = ((layer(x).double() - exact).abs() / rounding).max()
    expect(worst < 2, f"an update is {worst:.0f} roundings to bf16 off")


@robustness("The fp32 update promotes the output, and later layers run in fp32.", "mflux #740")
def output_keeps_its_precision(lora: Implementation) -> None:
    """The output has the dtype of the base's output, on a bf16 base and under autocast."""
    x = torch.randn(5, 12)
    half = lora.wrap(nn.Linear(12, 20).bfloat16(), 4, 12, 0.0)
    kind = half(x.bfloat16()).dtype
    expect(kind is torch.bfloat16, f"the output on a bf16 base is {kind}")

    layer = adapted(lora).layer.float()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expect(y.dtype is torch.bfloat16, f"the output under autocast to bf16 is {y.dtype}")
    expect_same(y, expected, "the output under autocast to bf16", 0.02)
    y.float().sum().backward()
    kind = lora.factors(layer)[0].grad.dtype
    expect(kind is torch.float32, f"the gradient of A under autocast is {kind}")


@interface(
    "A loss multiplies by the head's weight, which lacks the update.", "trl #4612", "trl #5977"
)
def a_loss_reads_the_weight(lora: Implementation) -> None:
    """A loss that reads `layer.weight` fails, or gets W with the update."""
    layer: Any = adapted(lora, bias=False).layer
    x = torch.randn(5, 12).double()
    ids = torch.arange(5)
    try:
        loss = F.cross_entropy(F.linear(x, layer.weight), ids)
    except Exception:
        return
    expect_same(loss, F.cross_entropy(layer(x), ids), "the loss", 1e-6)
