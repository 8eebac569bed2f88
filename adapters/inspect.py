"""Show what an adapter changes, layer by layer: `python -m adapters.inspect runs/lora`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters.factors import read_factors
from adapters.load import load_model
from common.cli import Parser, print_table
from common.errors import run_command
from common.figures import can_draw, save_figure, subplots
from lora.inject import lora_layers


def effective_rank(s: Tensor) -> float:
    """Return exp(-sum p_i log p_i) with p_i = s_i^2 / sum s^2: k for k equal singular values.

    After Roy & Vetterli 2007 (https://ieeexplore.ieee.org/document/7098875), whose p_i are shares
    of sum s; these are shares of the squared norm.
    """
    return torch.special.entr(s.square() / s.square().sum()).sum().exp().item()


def describe(s: Tensor) -> list[str]:
    """Return the table cells of a change that has these singular values."""
    if not s.any():
        return 5 * ["B is zero"]
    shares = s.square().cumsum(0) / s.square().sum()
    return [
        *(f"{x:.3g}" for x in torch.cat((s, s.new_zeros(2)))[:3]),
        f"{(shares < 0.9).sum() + 1} of {len(s)}",
        f"{effective_rank(s):.1f}",
    ]


def draw(spectra: dict[str, Tensor], title: str, path: Path) -> None:
    """Draw the singular values: a panel for each kind of layer, a line for each block."""
    kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in spectra))
    blocks = 1 + max(int(name.split(".")[1]) for name in spectra)
    figure, (axes,) = subplots(
        1, len(kinds), figsize=(2.5 + 3 * len(kinds), 4), sharey=True, squeeze=False
    )
    colours = axes[0].scatter([], [], c=[], cmap="viridis", vmin=0, vmax=max(1, blocks - 1))
    for name, s in spectra.items():
        _, block, kind = name.split(".", 2)
        axis = axes[kinds.index(kind)]
        axis.plot(range(1, len(s) + 1), s, "o-", markersize=3, color=colours.to_rgba(int(block)))
        axis.set(title=kind, xlabel="k")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[0].set(ylabel="k-th singular value of scaling * B A", ylim=(0, None))
    figure.colorbar(colours, ax=axes, label="block", ticks=range(0, blocks, 1 + blocks // 12))
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path)
    print(f"drawn in {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="adapters.inspect", description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="DIR")
    parser.add_argument(
        "--base",
        metavar="B",
        help="show the changes relative to its weights' "
        "norms, too; auto: the base that the adapter names",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="of spectrum.png (default: DIR)")
    args = parser.parse_args(argv)
    spectra = {name: factors.svd()[1] for name, factors in read_factors(args.adapter).items()}
    columns = ["layer", "norm", "s1", "s2", "s3", "hold 90 %", "effective rank"]
    rows = [[name, f"{s.norm():.4g}", *describe(s)] for name, s in spectra.items()]
    if args.base is not None:
        layers = lora_layers(load_model(args.base, args.adapter).model)
        columns.insert(2, "of the weight's")
        for row in rows:
            norm = layers[row[0]].base_layer.weight.norm()
            row.insert(2, f"{spectra[row[0]].norm() / norm:.2%}")
    print_table(columns, rows)
    if can_draw():
        draw(
            spectra,
            f"The change that {args.adapter} makes",
            (args.out or args.adapter) / "spectrum.png",
        )


if __name__ == "__main__":
    run_command(main)
