"""Run several adapters on one base in one batch. Each row of the batch chooses an adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.factors import Factors, refuse_dora
from adapters.load import Loaded, load_model, named_base
from adapters.quantisation import choose_quantisation
from common.errors import as_failure
from common.files import file_sha256
from lora import load_adapter, lora_layers, unwrap
from model.gpt2 import GPT2
from storage.hub import find_adapter, find_base
from storage.weights import weights_path


class BatchedLoRALinear(nn.Module):
    """y_i = W x_i + b + B_i A_i x_i for row i of the batch. B_i includes the scaling.

    Shapes: x (n, T, in), A (n, r, in), B (n, out, r), y (n, T, out). All adapters together take two
    batched matmuls (Sheng et al. 2023, https://arxiv.org/abs/2311.03285). `Adapters.use` sets A
    and B.
    """

    A: Tensor
    B: Tensor

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.base_layer(x), torch.bmm(x, self.A.mT), self.B.mT)


class Adapters:
    """Adapt a model with several adapters, and choose an adapter for each row of a batch.

    After `Adapters(model, base_sha256, {"poet": directory}).use(["poet", None])`, model(ids) with
    ids (2, T) returns the poet's logits in row 0 and the base's logits in row 1.

    Raises UserError for an adapter that does not fit the base, and for DoRA.
    """

    def __init__(self, model: GPT2, base_sha256: str, directories: Mapping[str, Path]):
        self.factors: dict[str | None, dict[str, Factors]] = {None: {}}
        for name, directory in directories.items():
            self.factors[name] = read_fitting_factors(model, directory, base_sha256)

        self.layers: dict[str, BatchedLoRALinear] = {}
        for layer in dict.fromkeys(layer for factors in self.factors.values() for layer in factors):
            base_layer = model.get_submodule(layer)
            assert isinstance(base_layer, nn.Linear)  # LoRA wraps only nn.Linear
            self.layers[layer] = BatchedLoRALinear(base_layer)
            model.set_submodule(layer, self.layers[layer])

    def use(self, names: Sequence[str | None]) -> None:
        """For row i of the next batches, use the adapter that is called names[i]. Adapters of lower
        rank are padded with zeros."""
        for layer, module in self.layers.items():
            weight = module.base_layer.weight  # (out, in)
            nothing = Factors(torch.zeros(len(weight), 0), torch.zeros(0, weight.size(1)))
            rows = [self.factors[name].get(layer, nothing) for name in names]
            rank = max(row.rank for row in rows)
            padded = [row.pad(rank) for row in rows]
            module.A = torch.stack([row.A for row in padded]).to(weight.device, weight.dtype)
            module.B = torch.stack([row.B for row in padded]).to(weight.device, weight.dtype)


def read_fitting_factors(model: GPT2, directory: Path, base_sha256: str) -> dict[str, Factors]:
    """Return an adapter's factors by layer, fp64. Raises UserError as `Adapters` does."""
    with as_failure():
        config = load_adapter(model, directory, base_sha256)
    layers = lora_layers(model)
    unwrap(model)
    refuse_dora(config, directory)
    factors = {}
    for name, layer in layers.items():
        a = layer.lora_A.weight.detach().double()
        b = layer.lora_B.weight.detach().double()
        factors[name] = Factors(layer.config.scaling * b, a)
    return factors


def load_several(
    base: str,
    directories: Sequence[Path],
    dtype: torch.dtype,
    quantise: str | None,
) -> tuple[Loaded, Adapters]:
    """Load a base and its adapters. If the base is `auto`, load the base that the first adapter
    names."""
    named = {str(directory): find_adapter(str(directory)) for directory in directories}
    if base == "auto":
        base = named_base(named[str(directories[0])])
    kind = choose_quantisation(quantise, named.values())
    loaded = load_model(base, None, dtype, kind)
    _, directory = find_base(loaded.base)
    return loaded, Adapters(loaded.model, file_sha256(weights_path(directory)), named)
