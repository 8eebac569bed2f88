"""Is a change of low rank, and do two runs find the same? `python -m lesson.experiments.spectrum`

Varied: the method (full fine-tuning, LoRA on c_attn at rank 8) and the seed, which decides the draw
of A and the order of the windows; for comparison, random matrices of the same shapes.
Fixed: mini, the default book, 60 steps of 16 windows of 128 tokens, fp32, lr 1e-3 for LoRA and 1e-4
for full fine-tuning.
Measured: the singular values of the change of each matrix; how alike the directions are that two
runs changed; the validation perplexity with full fine-tuning's change cut to rank k.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from common.figures import BASE, FULL, LORA, OTHER
from lesson.experiments.common import Trainer, band, panels, parse, save
from lesson.experiments.sweep import tuned

SVDs = dict[str, Any]  # by a matrix's name, the U, S and Vh of its change

RANKS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 0)
LORA_RANK = 8
TITLES = (
    "Fine-tuning's change: its rank, and how alike seeds are",
    "share of the squared norm in\nthe first k singular values",
    "similarity of the first k input or\noutput directions of c_attn, two runs",
    "perplexity of full fine-tuning,\nits change cut to rank k",
)

# The left panel's curves: which matrices, whose change, and how it is drawn.
SHARES = {
    "c_attn: LoRA": ("c_attn", "LoRA", LORA, "-"),
    "c_attn: full": ("c_attn", "full", FULL, "-"),
    "mlp.c_proj: full": ("mlp.c_proj", "full", OTHER, "-"),
    "c_attn: random": ("c_attn", "random", FULL, "--"),
    "mlp.c_proj: random": ("mlp.c_proj", "random", OTHER, "--"),
}

# The middle panel's curves: whose two changes, which of their directions, and how it is drawn.
PAIRS = {
    "full and full": ("full", "full", "inputs", FULL, "-"),
    "LoRA and full": ("LoRA", "full", "inputs", BASE, "-"),
    "LoRA and LoRA": ("LoRA", "LoRA", "inputs", LORA, "-"),
    "LoRA and full, outputs": ("LoRA", "full", "outputs", BASE, ":"),
    "LoRA and LoRA, outputs": ("LoRA", "LoRA", "outputs", LORA, ":"),
    "random and random": ("random", "random", "inputs", FULL, "--"),
}


def decomposed(changes: dict[str, Tensor]) -> SVDs:
    """Return the singular value decomposition of each change."""
    return {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}


def randomised(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random matrices of the changes' shapes."""
    return {name: torch.randn_like(change) for name, change in changes.items()}


def singular_values(svds: SVDs, target: str) -> Tensor:
    """Return the singular values of the target's change in each block, (blocks, k)."""
    return torch.stack([svd.S for name, svd in svds.items() if target in name])


def directions(svds: SVDs, side: str) -> Tensor:
    """Return c_attn's singular vectors in each block as rows, (blocks, k, n).

    Inputs are those on the right, which the change reads; outputs those on the left.
    """
    found = [svd for name, svd in svds.items() if "c_attn" in name]
    if side == "outputs":
        return torch.stack([svd.U for svd in found]).mT
    return torch.stack([svd.Vh for svd in found])


def similarity(v: Tensor, w: Tensor) -> Tensor:
    """Return ||V_k^T W_k||_F^2 / k (Hu et al. 2021, 7.2) of the first k singular vectors, which are
    the rows of `v` and `w` (blocks, k, n), mean over blocks.
    """
    squares = (v @ w.mT).square().mean(0).cumsum(0).cumsum(1).diagonal()  # (k,)
    return squares / torch.arange(1, len(squares) + 1)


def similarities(v: list[Tensor], w: list[Tensor]) -> Tensor:
    """Return the similarity of each run in `v` and each other seed's in `w`, (pairs, k)."""
    pairs = permutations(range(len(v)), 2)
    return torch.stack([similarity(v[i], w[j]) for i, j in pairs])


@torch.no_grad()
def cut(made: Trainer, svds: SVDs) -> list[float]:
    """Return the perplexity with the change of each matrix of the blocks cut to each of RANKS.

    The model is left with the last cut.
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
    """Return each run's share of the squared norm in the first k singular values, mean over blocks,
    for each curve of the left panel.
    """
    data = {}
    for label, (target, kind, _, _) in SHARES.items():
        values = torch.stack([singular_values(run, target) for run in svds[kind]])
        squares = values.square().cumsum(-1)  # (runs, blocks, k)
        shares = squares / squares[..., -1:]
        data[label] = shares.mean(1).tolist()
    return data


def similar_directions(svds: dict[str, list[SVDs]]) -> dict[str, list]:
    """Return how alike the first k directions are of each two runs, for each curve of the middle
    panel.
    """
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
    """Draw the shares, the similarities and the cuts."""
    figure, (left, middle, right) = panels(*TITLES)
    for label, (_, _, colour, line) in SHARES.items():
        y = torch.tensor(data[label])  # (runs, k)
        band(left, range(1, y.size(1) + 1), y, colour, label, line)
    for label, (_, _, _, colour, line) in PAIRS.items():
        y = torch.tensor(data[label])  # (pairs of runs, k)
        band(middle, range(1, y.size(1) + 1), y, colour, label, line)

    shown = RANKS[1:-1]  # the first cuts nothing, the last leaves nothing
    y = torch.tensor(list(data["cut"].values())).T  # (runs, ranks)
    band(right, shown, y[:, 1:-1], FULL, "cut to rank k", "o-")
    right.axhline(y[:, -1].mean(), color=BASE, linestyle=":", label="cut to rank 0")
    right.axhline(y[:, 0].mean(), color=BASE, linestyle="--", label="uncut")

    figure.set_size_inches(11, 5)
    for axis in (left, middle, right):
        axis.set(xscale="log", xlabel="k", xticks=shown, xticklabels=shown)
        axis.minorticks_off()
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    seeds = range(42, 42 + max(2, len(args.seeds)))
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
    return save(args, "spectrum", data, draw(data))


if __name__ == "__main__":
    main()
