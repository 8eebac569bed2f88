"""Read an adapter without the base, as two factors per layer: A, and B times the scaling.

Both factors are in fp64, so that a result is rounded only once, when the result is written.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, as_failure
from lora import LoRAConfig
from lora.load import load_adapter_config
from lora.peft_config import CONFIG
from lora.save import PREFIX, WEIGHTS
from lora.targets import layer_config
from storage.tensor_files import read_shapes, read_tensors

A_KEY = ".lora_A.weight"
B_KEY = ".lora_B.weight"
NUMBER = re.compile(r"(\d+)")


class Factors(NamedTuple):
    """The factors of a weight's change, which is B A. B (out, r) includes the scaling, and A is (r,
    in)."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return len(self.A)

    def pad(self, rank: int) -> "Factors":
        """Return factors of this rank with the same product: B and A padded with zeros."""
        more = rank - self.rank
        return Factors(F.pad(self.B, (0, more)), F.pad(self.A, (0, 0, 0, more)))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the SVD of B A: U (out, k), S (k,) and V^T (k, in).

        QR gives B A = Q1 (R1 R2^T) Q2^T, and the SVD of the small R1 R2^T gives the SVD of B A.
        """
        q1, r1 = torch.linalg.qr(self.B)
        q2, r2 = torch.linalg.qr(self.A.T)
        u, s, vh = torch.linalg.svd(r1 @ r2.T)
        return q1 @ u, s, vh @ q2.T


def refuse_dora(config: LoRAConfig, directory: Path) -> None:
    if config.use_dora:
        raise UserError(f"{directory}: is DoRA, whose change is not B A alone; merge it instead")


def refuse_model(directory: Path) -> None:
    """Raise UserError for a whole model, such as the result of full fine-tuning."""
    if (directory / "config.json").exists() and not (directory / CONFIG).exists():
        raise UserError(
            f"{directory}: is a whole model, whose change has no A and B; give an adapter"
        )


def read_factors(directory: Path) -> dict[str, Factors]:
    """Return an adapter's factors. The keys are PEFT's layer names.

    Raises UserError for DoRA, and for a layer that lacks A or B, or whose rank differs from the
    config's rank.
    """
    refuse_model(directory)
    path = directory / WEIGHTS
    with as_failure():
        config = load_adapter_config(directory)
    refuse_dora(config, directory)
    shapes = read_shapes(path)
    configs = {layer: layer_config(config, layer) for layer in _layer_names(path, shapes)}

    wanted = {}  # shapes: the config gives r, the file gives in_features and out_features
    for layer, own in configs.items():
        a_key, b_key = _keys(layer)
        wanted[a_key] = [own.r, *shapes[a_key][1:]]
        wanted[b_key] = [*shapes.get(b_key, [])[:1], own.r]
    tensors = dict(read_tensors(path, wanted))

    factors = {}
    for layer, own in configs.items():
        a_key, b_key = _keys(layer)
        factors[layer] = Factors(own.scaling * tensors[b_key].double(), tensors[a_key].double())
    return factors


def _layer_names(path: Path, shapes: dict[str, list[int]]) -> list[str]:
    """Return the names of adapted layers in block order. Raises UserError if there are none."""
    keys = [key for key in shapes if key.startswith(PREFIX) and key.endswith(A_KEY)]
    names = [key.removeprefix(PREFIX).removesuffix(A_KEY) for key in keys]
    if not names:
        raise UserError(f"{path}: contains no layer of an adapter")
    return sorted(names, key=_by_block)


def _by_block(name: str) -> list[int | str]:
    """Return a sort key that puts h.10 after h.9. Every second item of the key is a number."""
    return [int(part) if part.isdigit() else part for part in NUMBER.split(name)]


def _keys(layer: str) -> tuple[str, str]:
    """Return the keys of the layer's A and B in PEFT's file."""
    return PREFIX + layer + A_KEY, PREFIX + layer + B_KEY
