"""Sum adapters of the same base: `python -m adapters.combine A [B ...] --out DIR`.

The result is plain LoRA, not a variant such as rsLoRA. All layers have the same rank r, and
lora_alpha = r.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.factors import Factors, read_factors, truncate, write_factors
from adapters.quantisation import common_quantisation
from common.cli import Parser, number
from common.errors import UserError, as_failure, run_command
from common.files import new_directory, refuse_existing
from lora.load import read_header, stored_base_fields
from lora.save import BASE_SHA256, QUANTISED
from storage.hub import find_adapter


def combine(
    adapters: Sequence[dict[str, Factors]], weights: Sequence[float], rank: int | None = None
) -> tuple[dict[str, Factors], float]:
    """Return sum_i w_i B_i A_i for each layer, and the share of the squared norm that truncation
    keeps.

    All layers get the same rank. This rank is the highest rank among the layers' sums, but at most
    `rank` (if given), and at most the smallest `in` or `out` among all layers. A sum of a higher
    rank is truncated by SVD. A layer that an adapter lacks counts as zero. Raises UserError if the
    shapes of a layer differ.
    """
    layers = dict.fromkeys(layer for adapter in adapters for layer in adapter)
    total = {layer: _sum_of(layer, adapters, weights) for layer in layers}
    exact = max(factors.rank for factors in total.values())
    smallest_side = min(min(len(f.B), f.A.size(1)) for f in total.values())
    rank = min(rank or exact, exact, smallest_side)
    if rank == exact:
        return {layer: factors.pad(rank) for layer, factors in total.items()}, 1.0

    cut = {}
    kept = 0.0
    whole = 0.0
    for layer, factors in total.items():
        u, s, vh = factors.pad(exact).svd()
        cut[layer] = truncate(u, s, vh, rank)
        kept += s[:rank].square().sum().item()
        whole += s.square().sum().item()
    return cut, kept / (whole or 1.0)


def _sum_of(
    layer: str, adapters: Sequence[dict[str, Factors]], weights: Sequence[float]
) -> Factors:
    """Return the factors of one layer's sum: the w_i B_i side by side, and the A_i stacked."""
    parts_b = []
    parts_a = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if layer in adapter:
            parts_b.append(weight * adapter[layer].B)
            parts_a.append(adapter[layer].A)
    if len({len(b) for b in parts_b}) > 1 or len({a.size(1) for a in parts_a}) > 1:
        raise UserError(f"{layer}: the shapes differ; these adapters have different bases")
    return Factors(torch.cat(parts_b, dim=1), torch.cat(parts_a))


def common_base(directories: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of `adapter_config.json` and of the tensor file's header that describe the
    common base of these adapters."""
    with as_failure():
        hashes = {directory: read_header(directory).get(BASE_SHA256) for directory in directories}
    hashed = [directory for directory in directories if hashes[directory]]
    for directory in hashed:
        if hashes[directory] != hashes[hashed[0]]:
            raise UserError(f"{hashed[0]} and {directory}: are adapters of different bases")
    quantisation = common_quantisation(directories)

    source = hashed[0] if hashed else directories[0]
    header = {BASE_SHA256: hashes[source], QUANTISED: quantisation}
    with as_failure():
        fields = stored_base_fields(source)
    return fields, {name: value for name, value in header.items() if value}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="adapters.combine", description=__doc__)
    parser.add_argument(
        "adapters",
        type=Path,
        nargs="+",
        metavar="ADAPTER",
        help="an adapter in PEFT's format, or OWNER/NAME on the hub",
    )
    parser.add_argument(
        "--weights",
        type=number(float, -1e6, 1e6),
        nargs="+",
        metavar="X",
        help="a factor for each adapter. A negative factor subtracts (default: 1)",
    )
    parser.add_argument(
        "--rank",
        type=number(int, 1),
        metavar="N",
        help="replace the sum by its best approximation of this rank (default: exact)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    weights = args.weights or [1.0] * len(args.adapters)
    if len(weights) != len(args.adapters):
        raise UserError(f"--weights: {len(weights)} weights for {len(args.adapters)} adapters")
    refuse_existing(args.out)
    directories = [find_adapter(str(adapter)) for adapter in args.adapters]
    base, header = common_base(directories)

    adapters = [read_factors(directory) for directory in directories]
    total, kept = combine(adapters, weights, args.rank)
    with new_directory(args.out) as directory:
        write_factors(total, directory, base, header)
    rank = next(iter(total.values())).rank
    print(f"{args.out}: r = lora_alpha = {rank}, {kept:.2%} of the sum's squared norm")


if __name__ == "__main__":
    run_command(main)
