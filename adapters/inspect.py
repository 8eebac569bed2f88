"""Show what an adapter changes, layer by layer: `python -m adapters.inspect runs/lora`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters.factors import read_factors
from adapters.load import load_model
from adapters.quantisation import NONE
from common.cli import Parser, print_table
from common.errors import run_command
from common.figures import can_draw, save_figure, subplots
from lora.inject import lora_layers
from lora.targets import full_name
from model.gpt2 import GPT2


def effective_rank(s: Tensor) -> float:
    """Return exp(-sum p_i log p_i) with p_i = s_i^2 / sum s^2: k for k equal singular values.

    After Roy & Vetterli 2007 (https://ieeexplore.ieee.org/document/7098875), whose p_i are shares
    of sum s; these are shares of the squared norm.
    """
    shares = s.square() / s.square().sum()
    return torch.special.entr(shares).sum().exp().item()


def describe(s: Tensor) -> list[str]:
    """Return the table cells of a change that has these singular values: the three largest, how
    many hold 90 % of the squared norm, and the effective rank.
    """
    if not s.any():
        return ["B is zero"] * 5
    largest = [f"{value:.3g}" for value in s[:3]]
    largest += ["0"] * (3 - len(largest))
    shares = s.square().cumsum(0) / s.square().sum()
    holding = 1 + int((shares < 0.9).sum())
    return [*largest, f"{holding} of {len(s)}", f"{effective_rank(s):.1f}"]


def weight_norms(base: str, adapter: Path) -> dict[str, float]:
    """Return the norm of the base's own weight in each layer that the adapter changes."""
    model = load_model(base, adapter, quantise=NONE).model
    norms = {}
    for name, layer in lora_layers(model).items():
        norms[full_name(model, name)] = layer.base_layer.weight.norm().item()
    return norms


def print_changes(spectra: dict[str, Tensor], norms: dict[str, float] | None) -> None:
    """Print a row for each layer; with the weights' norms, also how large the change is to them."""
    columns = ["layer", "norm", "s1", "s2", "s3", "hold 90 %", "effective rank"]
    if norms:
        columns.insert(2, "of the weight's")
    rows = []
    for name, s in spectra.items():
        norm = s.norm().item()
        row = [name.removeprefix(GPT2.adapter_prefix), f"{norm:.4g}"]
        if norms:
            row.append(f"{norm / norms[name]:.2%}")
        rows.append(row + describe(s))
    print_table(columns, rows)


def block_and_kind(name: str) -> tuple[int, str]:
    """Return a layer's block and kind: `h.3.attn.c_attn` gives 3 and `h.*.attn.c_attn`.

    A layer outside the blocks gives 0 and its name.
    """
    match = re.fullmatch(r"(.*?)\b(\d+)\.(.+)", name)
    if not match:
        return 0, name
    blocks, number, kind = match.groups()
    return int(number), f"{blocks}*.{kind}"


def draw(spectra: dict[str, Tensor], title: str, path: Path) -> None:
    """Draw the singular values: a panel for each kind of layer, a line for each block."""
    lines = []
    for name, s in spectra.items():
        block, kind = block_and_kind(name.removeprefix(GPT2.adapter_prefix))
        lines.append((block, kind, s))
    kinds = list(dict.fromkeys(kind for _, kind, _ in lines))
    blocks = 1 + max(block for block, _, _ in lines)

    size = (2.5 + 3 * len(kinds), 4)
    figure, grid = subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False)
    panels = dict(zip(kinds, grid[0], strict=True))
    colours = grid[0][0].scatter([], [], c=[], cmap="viridis", vmin=0, vmax=max(1, blocks - 1))
    for block, kind, s in lines:
        colour = colours.to_rgba(block)
        panels[kind].plot(range(1, len(s) + 1), s, "o-", markersize=3, color=colour)
    for kind, axes in panels.items():
        axes.set(title=kind, xlabel="k")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)

    grid[0][0].set(ylabel="k-th singular value of scaling * B A", ylim=(0, None))
    ticks = range(0, blocks, 1 + blocks // 12)
    figure.colorbar(colours, ax=grid[0], label="block", ticks=ticks)
    figure.suptitle(title, parse_math=False)  # a $ in a path is a $
    save_figure(figure, path)
    print(f"drawn in {path}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="adapters.inspect", description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="DIR")
    parser.add_argument(
        "--base",
        metavar="B",
        help="show the changes relative to its weights' norms, too; auto: the base that the "
        "adapter names",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="of spectrum.png (default: DIR)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    spectra = {}
    for name, factors in read_factors(args.adapter).items():
        _, spectra[name], _ = factors.svd()
    norms = None
    if args.base is not None:
        norms = weight_norms(args.base, args.adapter)

    print_changes(spectra, norms)
    if can_draw():
        directory = args.out or args.adapter
        title = f"The change that {args.adapter} makes"
        draw(spectra, title, directory / "spectrum.png")


if __name__ == "__main__":
    run_command(main)
