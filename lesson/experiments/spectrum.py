"""Is a change of low rank, and do two runs find the same? `python -m lesson.experiments.spectrum`

Varied: the method (full fine-tuning, LoRA on c_attn at rank 8) and the seed, which decides the draw
of A and the order of the windows; for comparison, random matrices of the same shapes.
Fixed: mini, the default book, 60 steps of 16 windows of 128 tokens, fp32.
Measured: the singular values of the change of each matrix; how alike the directions are that two
runs changed; the validation perplexity with full fine-tuning's change cut to rank k.
"""

from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from lesson.experiments.common import BLUE, GREY, RED, YELLOW, Trainer, band, panels, parse, save
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

# The left panel: which matrices, whose change, and how its curve is drawn.
SHARES = (
    ("c_attn", "LoRA", RED, "-"),
    ("c_attn", "full", BLUE, "-"),
    ("mlp.c_proj", "full", YELLOW, "-"),
    ("c_attn", "random", BLUE, "--"),
    ("mlp.c_proj", "random", YELLOW, "--"),
)

# The middle panel: the two runs' methods, the directions compared, and how the curve is drawn.
PAIRS = (
    ("full", "full", "inputs", BLUE, "-"),
    ("LoRA", "full", "inputs", GREY, "-"),
    ("LoRA", "LoRA", "inputs", RED, "-"),
    ("LoRA", "full", "outputs", GREY, ":"),
    ("LoRA", "LoRA", "outputs", RED, ":"),
    ("random", "random", "inputs", BLUE, "--"),
)


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
        return torch.stack([svd.U.mT for svd in found])
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


def draw_shares(axis: Any, svds: dict[str, list[SVDs]]) -> dict[str, list]:
    """Draw the share of the squared norm in the first k singular values; return each run's."""
    data = {}
    for target, kind, colour, line in SHARES:
        values = torch.stack([singular_values(run, target) for run in svds[kind]])
        squares = values.square().cumsum(-1)  # (runs, blocks, k)
        y = (squares / squares[..., -1:]).mean(1)  # (runs, k)
        label = f"{target}: {kind}"
        band(axis, range(1, y.size(1) + 1), y, colour, label, line)
        data[label] = y.tolist()
    return data


def draw_similarities(axis: Any, svds: dict[str, list[SVDs]]) -> dict[str, list]:
    """Draw how alike the first k directions of two runs are; return each pair's similarities."""
    data = {}
    for one, other, side, colour, line in PAIRS:
        v = [directions(run, side) for run in svds[one]]
        w = [directions(run, side) for run in svds[other]]
        y = similarities(v, w)
        if one == "LoRA":
            y = y[:, :LORA_RANK]
        label = f"{one} and {other}"
        if side == "outputs":
            label += ", outputs"
        band(axis, range(1, y.size(1) + 1), y, colour, label, line)
        data[label] = y.tolist()
    return data


def draw_cuts(axis: Any, perplexities: Iterable[list[float]]) -> dict[int, list[float]]:
    """Draw the perplexity by the rank that was left; return each run's by rank."""
    y = torch.tensor(list(perplexities))  # (runs, ranks); the first rank cuts nothing, the last all
    band(axis, RANKS[1:-1], y[:, 1:-1], BLUE, "cut to rank k", "o-")
    axis.axhline(y[:, -1].mean(), color=GREY, linestyle=":", label="cut to rank 0")
    axis.axhline(y[:, 0].mean(), color=GREY, linestyle="--", label="uncut")
    return dict(zip(RANKS, y.T.tolist(), strict=True))


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

    figure, axes = panels(*TITLES)
    data: dict[str, Any] = draw_shares(axes[0], svds)
    data |= draw_similarities(axes[1], svds)
    runs = zip(full, svds["full"], strict=True)
    data["cut"] = draw_cuts(axes[2], [cut(made, run) for (made, _), run in runs])

    figure.set_size_inches(11, 5)
    for axis in axes:
        axis.set(xscale="log", xlabel="k", xticks=RANKS[1:-1], xticklabels=RANKS[1:-1])
        axis.minorticks_off()
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return save(args, "spectrum", data, figure)


if __name__ == "__main__":
    main()
