"""QLoRA's frozen base: linear layers that store W in four or eight bits per weight.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314 ("the paper" below). The authors' code is the
library bitsandbytes. Codes, scales and dequantised weights here are bitwise equal to bitsandbytes.

`quantise` replaces the linear layers of a model by quantised layers. `LoRALinear` can wrap a
quantised layer like any other linear layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.config import ALL_LINEAR, LoRAConfig
from lora.guards import check_linear
from lora.inject import errors_that_name
from lora.targets import find_targets

FP32 = torch.float32  # of levels and scales, whatever torch's default dtype is
BLOCK = 64  # weights that share a scale (paper, section 3, Double Quantization)
SCALE_BLOCK = 256  # scales that share a second scale


def nf4_levels() -> Tensor:
    """Return the 16 levels of 4-bit NormalFloat, fp32 (16,), ascending from -1 to 1.

    Weights are close to normally distributed, so the levels are quantiles of the normal
    distribution, and lie close together where most weights lie (paper, section 3). The 8 levels
    above 0 are the quantiles of 8 evenly spaced probabilities between 0.968 (`tail`) and 1/2. The 7
    levels below 0 are the negated quantiles of 7 evenly spaced probabilities in this range. The
    remaining level is 0, the quantile of 1/2, so a weight of 0 stays 0. Finally, all levels are
    divided by the largest level.

    In equation 4 of the paper, a level is the mean of two neighbouring quantiles. In appendix E, in
    the authors' code and here, a level is a quantile. The quantile of 1 is infinite, so the
    probabilities start at `tail`, not at 1. As in the authors' code, `tail` is
    (1 - 1/32 + 1 - 1/30) / 2, rounded to seven digits.
    """
    tail = 0.9677083
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=FP32)[:-1].double())  # (8,)
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=FP32)[:-1].double())  # (7,)
    levels = torch.cat([below, torch.zeros(1), above]).float().sort().values
    return levels / levels.max()


def scale_levels() -> Tensor:
    """Return the 256 levels of an 8-bit scale, fp32 (256,), ascending from -0.993 to 1.

    There are 127 levels for each sign: 64 evenly spaced levels in 0.1 .. 1, 32 levels in
    0.01 .. 0.1, and so on, down to one level in 1e-7 .. 1e-6. The two remaining levels are 0 and 1
    (Dettmers et al. 2022, section 1.3, https://arxiv.org/abs/2110.02861). The QLoRA paper names
    8-bit floats as the format of scales, but the authors' code uses these levels.
    """
    decades = []
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=FP32)
        centres = (bounds[:-1] + bounds[1:]) / 2
        decades.append(centres * 10 ** (i - 6))
    sizes = torch.cat(decades)  # (127,)
    return torch.cat([-sizes, torch.zeros(1), sizes, torch.ones(1)]).float().sort().values


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the level nearest to each x, uint8. `levels` must ascend."""
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(x, midpoints.to(x.device), out_int32=True).to(torch.uint8)


def scaled_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split x into n blocks. Return two fp32 tensors: x / absmax (n, size) and absmax (n,). The
    absmax of a block is max |x|.

    Each block has a separate scale, so an outlier lowers the resolution of only one block (paper,
    section 2). The last block is padded with zeros.
    """
    flat = x.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    inverse = 1 / absmax.clamp(min=1e-38)
    return (blocks * inverse[:, None]).clamp(-1, 1), absmax


def quantise_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise positive scales (n,) to 8 bits each (paper, section 3, Double Quantization).

    Return three tensors: the uint8 codes (n,), one second scale in fp32 per block of 256 scales,
    and the mean of all scales. The mean is subtracted before quantising, because the levels lie on
    both sides of 0.
    """
    mean = absmax.mean()
    x, scales = scaled_blocks(absmax - mean, SCALE_BLOCK)
    # Round each x to one of 2^16 evenly spaced values, as bitsandbytes' CPU kernel does.
    x = torch.floor((x + 1) * 32767.5 + 0.5) / 32767.5 - 1
    codes = nearest(x, scale_levels())
    return codes.flatten()[: len(absmax)], scales, mean


class QuantisedLinear(nn.Linear):
    """y = x W^T + b with a frozen W that a subclass stores in few bits.

    Shapes: x (..., in), y (..., out). Each call of `forward` dequantises W to the precision of x
    or, under autocast, to the precision of autocast. Each read of `weight` returns W as a new fp32
    tensor. A change to this tensor does not change the layer, so adapters cannot be merged into the
    layer.
    """

    kind: str  # the name of the subclass in options and files
    computes_linear = True
    no_rows: Tensor  # (0, in), in the dtype and on the device of the model. See `describe_weight`

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate W
        self.no_rows = layer.weight.detach().new_empty(0, layer.in_features)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        self.train(layer.training)
        self.requires_grad_(False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return W, (out, in)."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in nn.Linear
        return self.dequantised(torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        device = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = _DequantisedLinear.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def to_linear(self) -> nn.Linear:
        """Return a plain linear layer with the dequantised W, frozen and in the model's dtype."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.dequantised(self.no_rows.dtype), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantisedLinear":
        """Move the layer with the model. A cast changes the bias, but keeps the scales in fp32."""
        scales = {name: x for name, x in self.named_buffers() if x.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.no_rows = fn(self.no_rows)
        for name, scale in scales.items():
            moved = self.get_buffer(name)
            setattr(self, name, scale.to(moved.device))
        return self


class _DequantisedLinear(torch.autograd.Function):
    """Compute `F.linear` for frozen W and b. The only gradient is dL/dx = dL/dy W.

    Autograd would keep the dequantised W of every layer until the backward pass. This function
    keeps only the layer, and dequantises W again in the backward pass (paper, equations 5 and 6).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        bias: Tensor | None = layer.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.layer.dequantised(g.dtype), None


class Int8Linear(QuantisedLinear):
    """W = codes * absmax / 127, with codes in -127 .. 127 and absmax = max |W_row| for each row.

    Shapes: codes int8 (out, in), absmax fp32 (out,). Each weight takes 8 bits for its code, plus a
    share of `absmax`: 32 bits divided by the row's length `in`.
    """

    kind = "int8"
    codes: Tensor
    absmax: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        weight = layer.weight.detach().float()  # (out, in)
        absmax = weight.abs().amax(1)
        codes = torch.round(weight * (127 / absmax.clamp(min=1e-38))[:, None])
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("absmax", absmax)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.absmax[:, None] * (1 / 127)).to(dtype)


class NF4Linear(QuantisedLinear):
    """W_i = level[code_i] * absmax_j for weight i in block j. The levels are 4-bit NormalFloat. A
    block has 64 consecutive weights of the flattened W.

    Shapes for n weights: codes uint8 (n / 64, 32), with two codes per byte. Double quantisation
    stores absmax as 8-bit codes uint8 (n / 64,), second scales fp32 (n / 64 / 256,) and one mean.
    So a weight takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits.
    """

    kind = "nf4"
    codes: Tensor
    pairs: Tensor
    absmax: Tensor
    scale_levels: Tensor
    scales: Tensor
    mean: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        levels = nf4_levels()
        x, absmax = scaled_blocks(layer.weight.detach(), BLOCK)
        codes = nearest(x, levels)  # (n / 64, 64)
        self.register_buffer("codes", codes[:, 0::2] << 4 | codes[:, 1::2])  # two codes a byte
        # `pairs` maps a byte to two levels, so dequantising looks up two weights at once.
        self.register_buffer("pairs", torch.cartesian_prod(levels, levels), persistent=False)
        absmax, scales, mean = quantise_scales(absmax)
        self.register_buffer("scale_levels", scale_levels(), persistent=False)
        self.register_buffer("scales", scales)
        self.register_buffer("mean", mean)
        self.register_buffer("absmax", absmax)
        self.to(layer.weight.device)

    def block_scales(self) -> Tensor:
        """Return the absmax of each block, fp32 (n / 64,)."""
        levels = self.scale_levels[self.absmax.int()]
        scale_of_each = self.scales.repeat_interleave(SCALE_BLOCK)[: len(levels)]
        return levels * scale_of_each + self.mean

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        if self.pairs.is_meta and not self.codes.is_meta:  # after load_state_dict(assign=True)
            raise ValueError("it was quantised on the meta device; load it first, then quantise")
        # A pair of fp32 levels is viewed as one int64, because `index_select` is faster on single
        # numbers than on rows of two numbers.
        pairs = self.pairs.view(torch.int64).flatten()  # (256,)
        picked = torch.index_select(pairs, 0, self.codes.flatten().int())  # (n / 2,)
        blocks = picked.view(torch.float32).view(-1, BLOCK)  # levels
        blocks *= self.block_scales()[:, None]
        count = self.out_features * self.in_features
        return blocks.flatten()[:count].view(self.out_features, self.in_features).to(dtype)


LAYERS: dict[str, type[QuantisedLinear]] = {layer.kind: layer for layer in (NF4Linear, Int8Linear)}


def quantise(
    model: nn.Module, kind: Literal["nf4", "int8"], target_modules: Sequence[str] | str = ALL_LINEAR
) -> None:
    """Quantise linear layers of a model. `kind` is "nf4" or "int8". `target_modules` names the
    layers, as in `LoRAConfig`. The default, "all-linear", includes an untied head unless the model
    is from transformers (see `find_targets`).

    Raises ValueError for an unknown kind, for targets that `find_targets` refuses, for a layer
    whose forward is not W x + b, for a layer with hooks, for a complex weight, and for a quantised
    layer. After an error, the model is unchanged.
    """
    if kind not in LAYERS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(LAYERS)}")
    layers = {}
    for name in find_targets(model, LoRAConfig(target_modules=target_modules)):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        with errors_that_name(name):
            check_linear(layer)
            refuse_lost_hooks(layer)
            if isinstance(layer, QuantisedLinear):  # rounding twice adds an error
                raise ValueError(f"is quantised already, in {layer.kind}; `dequantise` first")
            if layer.weight.is_complex():
                raise ValueError("the weight is complex; leave out the layer")
        layers[name] = layer
    for name, layer in layers.items():
        model.set_submodule(name, LAYERS[kind](layer))


def refuse_lost_hooks(layer: nn.Module) -> None:
    """Raise ValueError if the layer has hooks of any kind."""
    if any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks")):
        kind = type(layer).__name__
        raise ValueError(f"{kind} has a hook, which would be lost with the layer; remove the hook")


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Return the model's quantised layers by module name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def quantisation(model: nn.Module) -> str | None:
    """Return the kind of the model's quantised layers, or None if no layer is quantised."""
    for layer in quantised_layers(model).values():
        return layer.kind
    return None


def quantised_weights(model: nn.Module) -> int:
    """Count the model's quantised weights, which `model.parameters()` does not contain."""
    layers = quantised_layers(model).values()
    return sum(layer.in_features * layer.out_features for layer in layers)


def dequantise(model: nn.Module) -> None:
    """Replace each quantised layer by a plain linear layer with the dequantised W, frozen and in
    the model's dtype. Raises ValueError for a layer with a hook. After an error, the model
    is unchanged."""
    layers = quantised_layers(model)
    for name, layer in layers.items():
        with errors_that_name(name):
            refuse_lost_hooks(layer)
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())
