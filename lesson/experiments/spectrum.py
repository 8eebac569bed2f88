"""Are changes of low rank, and do two runs find the same? `python -m lesson.experiments.spectrum`

Varied: the method (full fine-tuning, LoRA on c_attn at rank 8) and the seed, which sets A and the
order of the windows. The comparison is random matrices of the same shapes.
Fixed: mini, the default book, 60 steps of 4 windows of 128 tokens, lr 8e-3 for LoRA and 1e-3 for
full fine-tuning.
Measured: the singular values of the change of each matrix, the similarity of directions between two
runs, and the validation perplexity with the change of full fine-tuning cut to rank k.
"""

import argparse
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from common.figures import BASE, FULL, INK, LORA
from lesson.experiments.changes import tuned
from lesson.experiments.common import Steps, as_command, band, describe_seeds, experiment, panels
from lesson.figures import RANDOM, draw_at, name_line, shades

RUN = "LoRA: c_attn, rank 8, lr 8e-3. Full: lr 1e-3. 60 steps of 4 windows of 128 tokens."

SVDs = dict[str, Any]  # name of a matrix -> U, S and Vh of the change

RANKS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 0)
LORA_RANK = 8

# The curves in the left panel of spectrum.png: matrices, change, and line style.
SHARES = {
    "c_attn: LoRA": ("c_attn", "LoRA", LORA, "-"),
    "c_attn: full": ("c_attn", "full", FULL, "-"),
    "mlp.c_proj: full": ("mlp.c_proj", "full", shades(FULL, 2)[1], "-"),
    "c_attn: random": ("c_attn", "random", RANDOM, ":"),
    "mlp.c_proj: random": ("mlp.c_proj", "random", RANDOM, "-."),
}

# The curves of similarity.png: two changes, their directions, and the line style.
PAIRS = {
    "full and full": ("full", "full", "inputs", FULL, "-"),
    "LoRA and full": ("LoRA", "full", "inputs", LORA, "--"),
    "LoRA and LoRA": ("LoRA", "LoRA", "inputs", LORA, "-"),
    "LoRA and full, outputs": ("LoRA", "full", "outputs", LORA, "--"),
    "LoRA and LoRA, outputs": ("LoRA", "LoRA", "outputs", LORA, "-"),
    "random and random": ("random", "random", "inputs", RANDOM, ":"),
}


def decomposed(changes: dict[str, Tensor]) -> SVDs:
    """Return the singular value decomposition of each change."""
    return {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}


def randomised(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random matrices with the shapes of the changes."""
    return {name: torch.randn_like(change) for name, change in changes.items()}


def singular_values(svds: SVDs, target: str) -> Tensor:
    """Return the singular values of the change of the target in each block, (blocks, k)."""
    return torch.stack([svd.S for name, svd in svds.items() if target in name])


def directions(svds: SVDs, side: str) -> Tensor:
    """Return c_attn's singular vectors in each block as rows, (blocks, k, n).

    The change reads the right singular vectors (inputs) and writes the left vectors (outputs).
    """
    found = [svd for name, svd in svds.items() if "c_attn" in name]
    if side == "outputs":
        return torch.stack([svd.U for svd in found]).mT
    return torch.stack([svd.Vh for svd in found])


def similarity(v: Tensor, w: Tensor) -> Tensor:
    """Return ||V_k^T W_k||_F^2 / k (Hu et al. 2021, 7.2) for the first k singular vectors, averaged
    over blocks. The vectors are the rows of `v` and `w` (blocks, k, n).
    """
    squares = (v @ w.mT).square().mean(0).cumsum(0).cumsum(1).diagonal()  # (k,)
    return squares / torch.arange(1, len(squares) + 1)


def similarities(v: list[Tensor], w: list[Tensor]) -> Tensor:
    """Return the similarity of each run in `v` and every other seed in `w`, (pairs, k)."""
    pairs = permutations(range(len(v)), 2)
    return torch.stack([similarity(v[i], w[j]) for i, j in pairs])


@torch.no_grad()
def cut(made: Steps, svds: SVDs) -> list[float]:
    """Return the perplexity with the change of each block matrix cut to each of RANKS.

    The model keeps the last cut.
    """
    perplexities = []
    above = None
    for k in RANKS:
        for name, (u, s, vh) in svds.items():
            dropped = (u[:, k:above] * s[k:above]) @ vh[k:above]
            made.model.get_parameter(name).sub_(dropped)
        perplexities.append(made.evaluate().perplexity)
        above = k
    return perplexities


def shares_of_the_norm(svds: dict[str, list[SVDs]]) -> dict[str, list]:
    """Return each run's share of the squared norm in the first k singular values, averaged over
    blocks, for each of SHARES.
    """
    data = {}
    for label, (target, kind, _, _) in SHARES.items():
        values = torch.stack([singular_values(run, target) for run in svds[kind]])
        squares = values.square().cumsum(-1)  # (runs, blocks, k)
        shares = squares / squares[..., -1:]
        data[label] = shares.mean(1).tolist()
    return data


def similar_directions(svds: dict[str, list[SVDs]]) -> dict[str, list]:
    """Return the similarity of the first k directions of every two runs, for each of PAIRS."""
    data = {}
    for label, (one, other, side, _, _) in PAIRS.items():
        v = [directions(run, side) for run in svds[one]]
        w = [directions(run, side) for run in svds[other]]
        found = similarities(v, w)
        if one == "LoRA":
            found = found[:, :LORA_RANK]
        data[label] = found.tolist()
    return data


def draw(data: dict[str, Any]) -> Any:
    """Draw the shares and the cuts."""
    count = len(data["c_attn: LoRA"])
    figure, (left, right) = panels(
        "The change that fine-tuning makes: is its rank low? (mini)",
        f"{RUN} Lines: means of {describe_seeds(count)}, and over the blocks.",
        "share of the squared norm in\nthe first k singular values",
        "perplexity of full fine-tuning,\nits change cut to rank k",
    )
    for label, (_, _, colour, line) in SHARES.items():
        y = torch.tensor(data[label])  # (runs, k)
        band(left, range(1, y.size(1) + 1), y, colour, label, line)
    left.legend(loc="upper left", ncols=2)
    left.set_ylim(-0.05, 1.5)
    draw_at(left.yaxis, (0, 0.2, 0.4, 0.6, 0.8, 1))

    shown = RANKS[1:-1]  # the first rank cuts nothing, and the last removes the whole change
    y = torch.tensor(list(data["cut"].values())).T  # (runs, ranks)
    band(right, shown, y[:, 1:-1], FULL, line="o-")
    uncut = y[:, 0].mean().item()
    nothing = y[:, -1].mean().item()
    for level, words, colour in (
        (uncut, "uncut", FULL),
        (nothing, "cut to rank 0: the matrices are the base's", BASE),
    ):
        right.axhline(level, color=colour, linestyle="--")
        name_line(right, words, (1, level), colour, (0, 8))
    right.set_ylim(uncut - 1, nothing + 2)
    rank_ticks(left, right)
    return figure


def draw_similarity(data: dict[str, Any]) -> Any:
    """Draw the similarity of two runs in the directions that a change reads and writes."""
    figure, (inputs, outputs) = panels(
        "Does another seed find the same change of c_attn? (mini)",
        "The k directions of a run are those with the largest singular values of its change. The "
        f"share is phi of Hu et al. 2021, 7.2. {RUN} Right: LoRA only. Lines and "
        "bands: means and ranges over pairs of seeds.",
        "share of the first k input directions\nthat two runs have in common",
        "share of the first k output directions\nthat two runs have in common",
    )
    panel = {"inputs": inputs, "outputs": outputs}
    for label, (_, _, side, colour, line) in PAIRS.items():
        y = torch.tensor(data[label])[:, :LORA_RANK]  # (pairs of runs, k)
        band(panel[side], range(1, LORA_RANK + 1), y, colour, label.partition(",")[0], line)
    for axis in (inputs, outputs):
        axis.axhline(1, color=INK, linewidth=0.8)
        xlabel = "k: how many directions are compared"
        axis.set(xlabel=xlabel, xlim=(0.8, LORA_RANK + 0.2), ylim=(-0.05, 1.5))
        draw_at(axis.yaxis, (0, 0.2, 0.4, 0.6, 0.8, 1))
        axis.legend(loc="upper left", ncols=2)
        name_line(axis, "1: all", (1, 1), INK, (0, 8))
    return figure


def rank_ticks(*axes: Any) -> None:
    """Set every axis to k from 1 to 256, in powers of two."""
    for axis in axes:
        axis.set(xscale="log", xlabel="k", xlim=(0.9, 285))
        draw_at(axis.xaxis, RANKS[1:-1])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    seeds = range(max(2, len(args.seeds)))
    full = [tuned("full", seed, args.short) for seed in seeds]
    lora = [tuned("LoRA", seed, args.short) for seed in seeds]
    random = [randomised(changes) for _, changes in full]
    svds = {
        "full": [decomposed(changes) for _, changes in full],
        "LoRA": [decomposed(changes) for _, changes in lora],
        "random": [decomposed(changes) for changes in random],
    }

    data: dict[str, Any] = shares_of_the_norm(svds) | similar_directions(svds)
    models = [made for made, _ in full]
    cuts = [cut(made, run) for made, run in zip(models, svds["full"], strict=True)]
    data["cut"] = {k: list(runs) for k, *runs in zip(RANKS, *cuts, strict=True)}
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    more = {"similarity": draw_similarity}
    return experiment("spectrum", measure, draw, __doc__, argv, more)


if __name__ == "__main__":
    as_command(main)
