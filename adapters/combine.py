"""Add adapters of one base: `python -m adapters.combine A B --weights 1 -1 --out DIR`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.config import base_name
from adapters.factors import Factors, read_factors, truncate, write_factors
from adapters.files import base_hash
from common.cli import Parser, number
from common.errors import UserError, run_command
from common.files import brief, refuse_existing


def combine(
    adapters: Sequence[dict[str, Factors]], weights: Sequence[float], rank: int | None = None
) -> tuple[dict[str, Factors], float]:
    """Return sum_i w_i B_i A_i for each layer, and the share of its squared norm that is kept.

    [w_1 B_1, w_2 B_2, ...] side by side and A_1, A_2, ... stacked are the sum itself. If its rank
    is above `rank`, or above a layer's smaller side, every layer is cut to its nearest matrix of
    that rank. A layer that an adapter lacks counts as zero. Raises UserError if shapes differ.
    """
    total = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        parts = [
            (weight * adapter[name].B, adapter[name].A)
            for weight, adapter in zip(weights, adapters, strict=True)
            if name in adapter
        ]
        if len({(len(b), a.size(1)) for b, a in parts}) > 1:
            raise UserError(f"{name}: its shapes differ; these adapters are of different bases")
        b, a = zip(*parts, strict=True)
        total[name] = Factors(torch.cat(b, 1), torch.cat(a))
    exact = max(len(f.A) for f in total.values())
    rank = min(rank or exact, exact, *(min(len(f.B), f.A.size(1)) for f in total.values()))
    if rank == exact:
        return {name: factors.pad(rank) for name, factors in total.items()}, 1.0
    parts = {name: factors.pad(exact).svd() for name, factors in total.items()}
    kept, whole = (
        sum(s[:k].square().sum().item() for _, s, _ in parts.values()) for k in (rank, exact)
    )
    return {name: truncate(*part, rank) for name, part in parts.items()}, kept / (whole or 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="adapters.combine", description=__doc__)
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER")
    parser.add_argument(
        "--weights",
        type=number(float, -1e6, 1e6),
        nargs="+",
        metavar="X",
        help="a factor for each adapter; a negative one subtracts (default: 1)",
    )
    parser.add_argument(
        "--rank",
        type=number(int, 1),
        metavar="N",
        help="cut the sum to its best approximation of this rank (default: exact)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    weights = args.weights or [1.0] * len(args.adapters)
    if len(weights) != len(args.adapters):
        raise UserError(f"--weights: {len(weights)} for {len(args.adapters)} adapters")
    refuse_existing(args.out)
    bases = {base_hash(d): d for d in args.adapters}
    unknown = bases.pop(None, None)  # an adapter from elsewhere has no hash
    if len(bases) > 1:
        raise UserError("{} and {}: are adapters of different bases".format(*bases.values()))
    names = dict.fromkeys(brief(base_name(d)) for d in args.adapters)
    if unknown and len(names) > 1:
        print(
            f"note: these adapters name their bases {' and '.join(names)}; the sum means "
            "something only if these are one"
        )
    source = next(iter(bases.values()), args.adapters[0])
    total, kept = combine([read_factors(d) for d in args.adapters], weights, args.rank)
    write_factors(total, args.out, str(base_name(source) or ""), next(iter(bases), ""))
    print(
        f"{args.out}: rank {len(next(iter(total.values())).A)}, {kept:.2%} of the sum's squared "
        "norm"
    )


if __name__ == "__main__":
    run_command(main)
