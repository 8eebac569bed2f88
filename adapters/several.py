"""Run several adapters on one base in one batch: each row has its own."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.factors import Factors, read_factors
from adapters.files import load_adapter
from adapters.load import Loaded, load_model, named_base
from common.files import file_sha256
from model.gpt2 import GPT2
from model.hub import find_base
from model.weights import weights_path


class BatchedLoRALinear(nn.Module):
    """y_i = W x_i + b + B_i A_i x_i: row i of the batch has its own A and B, scaling included.

    Shapes: x (n, T, in), A (n, r, in), B (n, out, r), y (n, T, out). Any number of adapters takes
    two batched matmuls (Sheng et al. 2023, https://arxiv.org/abs/2311.03285). `Adapters` sets A, B.
    """

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.base_layer(x), torch.bmm(x, self.A.mT), self.B.mT)


class Adapters:
    """The adapters of one base, and which row of a batch has which: after `add("poet", directory)`
    and `use(["poet", None])`, model(ids) with ids (2, T) gives the poet's logits and the base's.
    """

    def __init__(self, model: GPT2, base_sha256: str):
        self.model, self.base_sha256 = model, base_sha256
        self.factors: dict[str | None, dict[str, Factors]] = {None: {}}
        self.layers: dict[str, BatchedLoRALinear] = {}

    def add(self, name: str, directory: Path) -> None:
        """Read an adapter. Raises UserError if it does not fit the base."""
        with torch.device("meta"):
            skeleton = GPT2(self.model.config)
        load_adapter(skeleton, directory, self.base_sha256)  # refuses other layers and shapes
        self.factors[name] = read_factors(directory)
        for layer in self.factors[name].keys() - self.layers.keys():
            self.layers[layer] = BatchedLoRALinear(self.model.get_submodule(layer))
            self.model.set_submodule(layer, self.layers[layer])

    def use(self, names: Sequence[str | None]) -> None:
        """Give row i of the next batches the adapter names[i]; pad lower ranks with zeros."""
        for layer, module in self.layers.items():
            weight = module.base_layer.weight
            nothing = Factors(torch.zeros(len(weight), 0), torch.zeros(0, weight.size(1)))
            rows = [self.factors[name].get(layer, nothing) for name in names]
            rank = max(len(row.A) for row in rows)
            module.B, module.A = (
                torch.stack(x).to(weight.device, weight.dtype)
                for x in zip(*(row.pad(rank) for row in rows), strict=True)
            )


def load_several(
    base: str, directories: Sequence[Path], dtype: torch.dtype = torch.float32
) -> tuple[Loaded, Adapters]:
    """Load a base in `dtype` (`auto`: the one that the first adapter names) and the adapters, each
    under its path as its name.
    """
    loaded = load_model(named_base(directories[0]) if base == "auto" else base, None, dtype)
    adapters = Adapters(loaded.model, file_sha256(weights_path(find_base(loaded.base)[1])))
    for directory in directories:
        adapters.add(str(directory), directory)
    return loaded, adapters
