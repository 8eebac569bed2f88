"""Show what an adapter changes, layer by layer: `python -m adapters.inspect runs/lora`."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.factors import Factors, read_factors
from adapters.load import load_with_adapter
from common.cli import NONE, Parser, print_table
from common.errors import run_command
from common.figures import PAGE_WIDTH, can_draw, save_figure, subplots
from lora import lora_layers
from lora.peft_view import GPT2_VIEW, peft_view

TOP = 10  # number of singular vectors of W + dW to compare with the singular vectors of W
INTRUDER = 0.5  # a vector whose largest cosine is below this value is an intruder


def cosines(weight: Tensor, changed: Tensor) -> Tensor:
    """Compare the first TOP left singular vectors of the changed weight with all left singular
    vectors of W. For each of these TOP vectors, return the largest absolute cosine, (TOP,).

    A vector whose largest cosine is below INTRUDER is an intruder dimension (Shuttleworth et al.
    2024, https://arxiv.org/abs/2410.21228, algorithm 1).
    """
    before = torch.linalg.svd(weight, full_matrices=False).U  # (out, k)
    after = torch.linalg.svd(changed, full_matrices=False).U[:, :TOP]  # (out, TOP)
    return (before.T @ after).abs().amax(0)


def projected_norm(weight: Tensor, u: Tensor, vh: Tensor) -> float:
    """Return ||U^T W V||_F, the size of W in the directions U (out, r) and V^T (r, in)."""
    return (u.T @ weight @ vh.T).norm().item()


def amplification(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Return ||dW||_F / ||U^T W V||_F for dW = U S V^T. The ratio compares the change with the part
    of W in the directions of the change (Hu et al. 2021, 7.3).
    """
    changed = s > 1e-6 * s[0]  # zeros that pad A and B have no direction
    return s.norm().item() / projected_norm(weight, u[:, changed], vh[changed])


def effective_rank(s: Tensor) -> float:
    """Return exp(-sum p_i log p_i) with p_i = s_i^2 / sum s^2. The result is k if k of the s_i are
    equal and the others are 0.

    In Roy & Vetterli 2007 (https://ieeexplore.ieee.org/document/7098875), p_i = s_i / sum s. Here,
    p_i is a share of the squared norm.
    """
    shares = s.square() / s.square().sum()
    return torch.special.entr(shares).sum().exp().item()


def describe(s: Tensor) -> list[str]:
    """Return five table cells: the three largest s_i, the number of s_i that make up 90 % of
    sum s^2, and the effective rank.
    """
    if not s.any():
        return ["B is zero"] * 5
    largest = [f"{value:.3g}" for value in s[:3]]
    largest += ["0"] * (3 - len(largest))
    shares = s.square().cumsum(0) / s.square().sum()
    holding = 1 + int((shares < 0.9).sum())
    return [*largest, f"{holding} of {len(s)}", f"{effective_rank(s):.1f}"]


class BesideWeight(NamedTuple):
    """Table cells that compare a layer's change with the layer's weight in the base."""

    relative_norm: str
    spectra: list[str]  # intruders, the least cosine, amplification


def beside_weights(
    base: str, adapter: Path, factors: dict[str, Factors]
) -> dict[str, BesideWeight]:
    """Compare each layer's change with the layer's weight in the base."""
    model = load_with_adapter(base, adapter, quantise=NONE).model
    prefix = peft_view(model).prefix
    found = {}
    for own, layer in lora_layers(model).items():
        name = prefix + own
        weight = layer.base_layer.weight.detach().float()
        change = (factors[name].B @ factors[name].A).float()
        u, s, vh = (part.float() for part in factors[name].svd())
        cells = ["B is zero"] * 3
        if s.any():
            largest = cosines(weight, weight + change)  # (10,)
            cells = [
                f"{int((largest < INTRUDER).sum())} of {len(largest)}",
                f"{largest.min().item():.2f}",
                f"{amplification(weight, u, s, vh):.3g}",
            ]
        found[name] = BesideWeight(f"{change.norm() / weight.norm():.2%}", cells)
    return found


def print_changes(spectra: dict[str, Tensor], beside: dict[str, BesideWeight]) -> None:
    """Print a row for each layer. With a base, the row also compares the change with the weight."""
    columns = ["layer", "norm", "s1", "s2", "s3", "90 % of norm^2", "effective rank"]
    if beside:
        columns.insert(2, "relative to W")
        columns += ["intruders", "least cosine", "amplification"]
    rows = []
    for name, s in spectra.items():
        row = [name.removeprefix(GPT2_VIEW.prefix), f"{s.norm().item():.4g}"]
        row += describe(s)
        if beside:
            row.insert(2, beside[name].relative_norm)
            row += beside[name].spectra
        rows.append(row)
    print_table(columns, rows)


def block_and_kind(name: str) -> tuple[int, str]:
    """Return a layer's block and kind: `h.3.attn.c_attn` gives 3 and `h.*.attn.c_attn`."""
    match = re.fullmatch(r"(.*?)\b(\d+)\.(.+)", name)
    if not match:
        return 0, name
    blocks, number, kind = match.groups()
    return int(number), f"{blocks}*.{kind}"


def draw(spectra: dict[str, Tensor], title: str, path: Path) -> None:
    """Draw the singular values: a panel for each kind of layer, a line for each block."""
    places = {name: block_and_kind(name.removeprefix(GPT2_VIEW.prefix)) for name in spectra}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    blocks = 1 + max(block for block, _ in places.values())

    rows = math.ceil(len(kinds) / 2)
    columns = min(2, len(kinds))
    size = (PAGE_WIDTH, 0.8 + 2 * rows)
    figure, grid = subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    figure.suptitle(title, parse_math=False)  # a path may contain $
    panels = grid.flatten()
    for axes in panels[len(kinds) :]:
        axes.remove()
    for axes, kind in zip(panels, kinds, strict=False):
        axes.set(title=kind, xlabel="k")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panels[0].set_ylabel("k-th singular value")

    colours = panels[0].scatter([], [], c=[], cmap="viridis", vmin=0, vmax=max(1, blocks - 1))
    ticks = range(0, blocks, 1 + blocks // 12)
    figure.colorbar(colours, ax=list(panels[: len(kinds)]), label="block", ticks=ticks)
    for name, s in spectra.items():
        block, kind = places[name]
        axes = panels[kinds.index(kind)]
        axes.plot(range(1, len(s) + 1), s, "o-", markersize=3, color=colours.to_rgba(block))
    panels[0].set(ylim=(0, None))
    save_figure(figure, path)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="adapters.inspect", description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="DIR")
    parser.add_argument(
        "--base",
        metavar="B",
        help="also compare the changes with the weights of this base: norms, intruder dimensions, "
        "amplification. auto: the base that the adapter names",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="directory for spectrum.png (default: DIR)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    factors = read_factors(args.adapter)
    spectra = {name: layer.svd()[1] for name, layer in factors.items()}
    beside = {}
    if args.base is not None:
        beside = beside_weights(args.base, args.adapter, factors)

    print_changes(spectra, beside)
    if can_draw():
        directory = args.out or args.adapter
        title = f"The change that {args.adapter} makes"
        draw(spectra, title, directory / "spectrum.png")


if __name__ == "__main__":
    run_command(main)
