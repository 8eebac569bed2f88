"""Linear layers and a small model for the checks to adapt, and helpers to look inside."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_conformance.bench import Implementation, Missing, Refused, expect


class InOutLinear(nn.Module):
    """y = x W + b with W (in, out), as in GPT-2's files."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out) / fan_in**0.5)
        self.bias = nn.Parameter(torch.randn(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    """x + c_proj(relu(proj(x))). The name `c_proj` ends in the name `proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12)
        self.c_proj = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_proj(self.proj(x).relu())


class Model(nn.Module):
    """A language model with layers such as `transformer.h.0.proj`. The head is tied."""

    def __init__(self, blocks: int = 4, name: str = "h", tied: bool = True):
        super().__init__()
        self.config = {"model_type": "custom", "tie_word_embeddings": tied}  # for PEFT
        self.embed_tokens = nn.Embedding(17, 8)
        stack = nn.ModuleList(Block() for _ in range(blocks))
        self.transformer = nn.ModuleDict({name: stack})
        self.lm_head = nn.Linear(8, 17, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for block in self.blocks():
            x = block(x)
        return self.lm_head(x)

    def blocks(self) -> Any:
        [blocks] = self.transformer.values()
        return blocks


class Adapted(NamedTuple):
    """An adapted layer in fp64, a copy of the base, A (r, in) and B (out, r), and the factor of B A
    as measured. Only the checks of scaling compare the measured factor with the expected factor.
    """

    layer: nn.Module
    base: nn.Linear
    a: Tensor
    b: Tensor
    scaling: float

    def weight(self) -> Tensor:
        """Return W + scaling * B A, (out, in)."""
        return (self.base.weight + self.scaling * self.b @ self.a).detach()


def adapted(
    lora: Implementation,
    fan_in: int = 12,
    fan_out: int = 20,
    r: int = 4,
    alpha: float = 12,
    dropout: float = 0.0,
    bias: bool = True,
    **options: Any,
) -> Adapted:
    """Wrap a linear layer and draw A and B at random, as after training."""
    base = nn.Linear(fan_in, fan_out, bias)
    layer = lora.wrap(deepcopy(base), r, alpha, dropout, **options).double()
    base.double().requires_grad_(False)
    a, b = factors(lora, layer, r)
    draw(a, b)
    if options.get("use_dora"):
        stretch(others(layer, a, b))
    layer.eval()
    update = weight_of(layer, fan_in) - base.weight
    layer.train()
    product = (b @ a).detach()
    scaling = ((update * product).sum() / product.square().sum()).item()
    return Adapted(layer, base, a, b, scaling)


Options = dict[str, Any]
PLAIN: Options = {}
DORA: Options = {"use_dora": True}
RSLORA: Options = {"use_rslora": True}
IN_OUT: Options = {"fan_in_fan_out": True}
SLICES: Options = {"slices": (0, 2)}


def supported(lora: Implementation, *kinds: Options) -> list[Options]:
    """Return the keywords that `wrap` takes and does not refuse. Raise Missing if there are none"""
    found, reasons = [], []
    for options in kinds:
        try:
            lora.wrap(base_for(options), 4, 12, 0.0, **options)
            found.append(options)
        except (Missing, ValueError, RuntimeError) as error:
            reasons.append(error)
    if not found:
        raise reasons[0] if isinstance(reasons[0], Missing) else Refused(str(reasons[0]))
    return found


def for_each(kinds: Iterable[Options], run: Callable[[Options], None]) -> None:
    """Run a part of a check for each kind. A refusal of one kind does not end the others."""
    refusals = []
    for options in kinds:
        try:
            run(options)
        except Refused as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def base_for(options: Options, fan_out: int = 24) -> nn.Module:
    return (InOutLinear if options.get("fan_in_fan_out") else nn.Linear)(12, fan_out)


def named(options: Options) -> str:
    return ", ".join(name.removeprefix("use_") for name in options) or "LoRA"


def factors(lora: Implementation, layer: nn.Module, r: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r): views of parameters in any orientation."""
    a, b = lora.factors(layer)
    return (a if len(a) == r else a.T), (b if b.size(1) == r else b.T)


def others(layer: nn.Module, *known: Tensor) -> list[Tensor]:
    """Return the trained parameters that are not in `known`, such as DoRA's magnitude."""
    places = {tensor.data_ptr() for tensor in known}
    return [p for p in trained(layer) if p.data_ptr() not in places]


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@torch.no_grad()
def stretch(magnitudes: Iterable[Tensor]) -> None:
    """Multiply each number of DoRA's magnitude by a random factor between 1 and 1.2."""
    for magnitude in magnitudes:
        magnitude *= 1 + 0.2 * torch.rand_like(magnitude)


@torch.no_grad()
def draw(*tensors: Tensor) -> None:
    """Fill tensors with normal numbers (std 0.3), so that B is not zero, as after training."""
    for tensor in tensors:
        tensor.normal_(std=0.3)


@torch.no_grad()
def weight_of(layer: nn.Module, fan_in: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the whole weight (out, in) that a layer applies, including the update."""
    zero = torch.zeros(1, 1, fan_in, dtype=dtype)
    return (layer(torch.eye(fan_in, dtype=dtype)[None]) - layer(zero))[0].T


def off_by(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, as a share of the norm of `expected`."""
    difference = (value.detach().double() - expected.detach().double()).norm()
    return (difference / expected.detach().double().norm().clamp_min(1e-30)).item()


def expect_same(value: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    expect(value.shape == expected.shape, f"{what} has shape {tuple(value.shape)}")
    error = off_by(value, expected)
    expect(error <= tolerance, f"{what} is off by {error:.2g} of its norm")


def expect_merges_and_unmerges(
    lora: Implementation, layer: nn.Module, base: nn.Module, what: str, use_dora: bool = False
) -> None:
    """Merging and unmerging keep the output. A merged output does not depend on B. Without an
    update, the unmerged layer is the base.
    """
    tolerance = 1e-5 if use_dora else 1e-6
    x = torch.randn(1, 5, 12).double()
    expected = layer(x).detach()
    parameters = trained(layer)
    lora.merge(layer)
    expect_same(layer(x), expected, f"the merged output of {what}", tolerance)
    with changed(*parameters):
        expect_same(layer(x), expected, f"after a change of A and B, the merged {what}", tolerance)
    if not lora.has("unmerge"):
        return
    lora.unmerge(layer)
    expect_same(layer(x), expected, f"the unmerged output of {what}", tolerance)

    a, b = lora.factors(layer)
    with torch.no_grad():
        a.zero_()
        if use_dora:
            [magnitude] = others(layer, a, b)
            fan_in = 0 if isinstance(base, InOutLinear) else 1
            norms = base.get_parameter("weight").norm(dim=fan_in)
            magnitude.copy_(norms.view_as(magnitude))
    expect_same(layer(x), base(x), f"the output of {what} when A is zero afterwards", tolerance)


@contextmanager
def changed(*factors: Tensor) -> Iterator[None]:
    """Double factors, which changes the output of a layer that is not really merged."""
    for factor in factors:
        factor.data *= 2
    yield
    for factor in factors:
        factor.data /= 2
