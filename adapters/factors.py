"""Read and write an adapter without its base: per layer, scaling * B (out, r) and A (r, in).

Both are in fp64, so that a result computed from them is rounded only once, when it is written.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.config import load_adapter_config
from adapters.files import PREFIX, adapter_path, write_adapter
from common.errors import UserError
from common.tensors import read_shapes, read_tensors
from lora.dora import DoRAConfig
from lora.layer import LoRAConfig
from lora.targets import layer_config

A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"


class Factors(NamedTuple):
    B: Tensor
    A: Tensor

    def pad(self, rank: int) -> "Factors":
        """Return the same change as factors of `rank`, padded with zeros."""
        more = rank - len(self.A)
        return Factors(F.pad(self.B, (0, more)), F.pad(self.A, (0, 0, 0, more)))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (out, k), S (k,) and V^T (k, in) of B A. With B = Q1 R1 and A^T = Q2 R2, only
        R1 R2^T, at most (r, r), is decomposed.
        """
        (q1, r1), (q2, r2) = torch.linalg.qr(self.B), torch.linalg.qr(self.A.T)
        u, s, vh = torch.linalg.svd(r1 @ r2.T)
        return q1 @ u, s, vh @ q2.T


def truncate(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Factors:
    """Return the nearest matrix of that rank in the Frobenius norm (Eckart & Young 1936,
    https://doi.org/10.1007/BF02288367), split evenly: B = U sqrt(S), A = sqrt(S) V^T.
    """
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * vh[:rank])


def read_factors(directory: Path) -> dict[str, Factors]:
    """Read an adapter by layer. Raises UserError for DoRA, and unless the file holds exactly an A
    and a B of the configured rank for each layer.
    """
    path, config = adapter_path(directory), load_adapter_config(directory)
    if isinstance(config, DoRAConfig):
        raise UserError(f"{directory}: is DoRA, whose change is not B A alone; merge it instead")
    shapes = read_shapes(path)
    names = [key.removesuffix(A_KEY) for key in shapes if key.endswith(A_KEY)]
    if not names or not all(re.match(re.escape(PREFIX) + r"h\.\d+\..", name) for name in names):
        raise UserError(f"{path}: is not an adapter of GPT-2's layers")
    names.sort(key=lambda name: [int(p) if p.isdigit() else p for p in name.split(".")])
    configs = {name: layer_config(config, name.removeprefix(PREFIX)) for name in names}
    # A (r, in) and B (out, r): r is the config's; in and out are the file's.
    wanted = {name + A_KEY: (c.r, *shapes[name + A_KEY][1:]) for name, c in configs.items()}
    wanted |= {
        name + B_KEY: (*shapes.get(name + B_KEY, ())[:1], c.r) for name, c in configs.items()
    }
    tensors = {key: tensor.double() for key, tensor in read_tensors(path, wanted)}
    return {
        name.removeprefix(PREFIX): Factors(tensors[name + B_KEY] * c.scaling, tensors[name + A_KEY])
        for name, c in configs.items()
    }


def write_factors(
    factors: dict[str, Factors], directory: Path, base: str, base_sha256: str
) -> None:
    """Write factors of one rank as an adapter whose scaling is 1: lora_alpha = r."""
    rank = len(next(iter(factors.values())).A)
    tensors = {
        PREFIX + name + key: tensor
        for name, (b, a) in factors.items()
        for key, tensor in ((A_KEY, a), (B_KEY, b))
    }
    write_adapter(
        tensors, LoRAConfig(rank, rank, 0.0, tuple(factors)), directory, base, base_sha256
    )
