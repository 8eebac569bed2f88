"""Show a change's rank, and how alike two changes are: `python -m lesson.experiments.spectrum`."""

from collections.abc import Iterator
from itertools import pairwise, permutations

import torch
from torch import Tensor

from lesson.experiments.common import BLUE, GREY, RED, YELLOW, Trainer, band, panels, parse, save
from lesson.experiments.sweep import tuned

RANKS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 0)
TITLES = (
    "Fine-tuning's change: its rank, and how alike seeds are",
    "share of the squared norm in\nthe first k singular values",
    "similarity of the first k input or\noutput directions of c_attn, two runs",
    "perplexity of full fine-tuning,\nits change cut to rank k",
)
SHARES = (
    ("c_attn", "LoRA", RED, "-"),
    ("c_attn", "full", BLUE, "-"),
    ("mlp.c_proj", "full", YELLOW, "-"),
    ("c_attn", "random", BLUE, "--"),
    ("mlp.c_proj", "random", YELLOW, "--"),
)
PAIRS = (
    ("full", "full", "Vh", BLUE, "-"),
    ("LoRA", "full", "Vh", GREY, "-"),
    ("LoRA", "LoRA", "Vh", RED, "-"),
    ("LoRA", "full", "U", GREY, ":"),
    ("LoRA", "LoRA", "U", RED, ":"),
    ("random", "random", "Vh", BLUE, "--"),
)


def similarity(v: Tensor, w: Tensor) -> Tensor:
    """Return ||V_k^T W_k||_F^2 / k (Hu et al. 2021, 7.2) of the first k singular vectors, which are
    the rows of `v` and `w` (blocks, k, n), mean over blocks.
    """
    squares = (v @ w.mT).square().mean(0).cumsum(0).cumsum(1).diagonal()  # (k,)
    return squares / torch.arange(1, len(squares) + 1)


@torch.no_grad()
def cut(made: Trainer, svds: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Iterator[float]:
    """Return the perplexity with the change of each matrix of the blocks cut to each rank."""
    for above, k in pairwise((None, *RANKS)):
        for name, (u, s, vh) in svds.items():
            made.model.get_parameter(name).sub_((u[:, k:above] * s[k:above]) @ vh[k:above])
        yield made.evaluate().perplexity


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    seeds = range(42, 42 + max(2, len(args.seeds)))
    runs = {kind: [tuned(kind, seed, args.short) for seed in seeds] for kind in ("full", "LoRA")}
    runs["random"] = [
        (made, {n: torch.randn_like(c) for n, c in changes.items()})
        for made, changes in runs["full"]
    ]
    svds = {
        kind: [
            {n: torch.linalg.svd(c, full_matrices=False) for n, c in changes.items()}
            for _, changes in found
        ]
        for kind, found in runs.items()
    }

    def stacks(part: str, kind: str, target: str = "c_attn") -> list[Tensor]:
        """Return each run's S of the target (blocks, k), or its U or Vh as rows (blocks, k, n)."""
        found = [
            torch.stack([getattr(svd, part) for name, svd in run.items() if target in name])
            for run in svds[kind]
        ]
        return [u.mT for u in found] if part == "U" else found

    data, (figure, axes) = {}, panels(*TITLES)
    for target, kind, colour, line in SHARES:
        squares = torch.stack(stacks("S", kind, target)).square().cumsum(-1)  # (runs, blocks, k)
        y = (squares / squares[..., -1:]).mean(1)
        data[label := f"{target}: {kind}"] = y.tolist()
        band(axes[0], range(1, y.size(1) + 1), y, colour, label, line)
    for one, other, part, colour, line in PAIRS:
        v, w = stacks(part, one), stacks(part, other)
        y = torch.stack([similarity(v[i], w[j]) for i, j in permutations(range(len(v)), 2)])
        y = y[:, :8] if one == "LoRA" else y  # LoRA's rank
        data[label := f"{one} and {other}" + ", outputs" * (part == "U")] = y.tolist()
        band(axes[1], range(1, y.size(1) + 1), y, colour, label, line)
    y = torch.tensor(
        [[*cut(made, found)] for (made, _), found in zip(runs["full"], svds["full"], strict=True)]
    )  # (runs, ranks)
    data["cut"] = dict(zip(RANKS, y.T.tolist(), strict=True))
    band(axes[2], RANKS[1:-1], y[:, 1:-1], BLUE, "cut to rank k", "o-")
    axes[2].axhline(y[:, -1].mean(), color=GREY, linestyle=":", label="cut to rank 0")
    axes[2].axhline(y[:, 0].mean(), color=GREY, linestyle="--", label="uncut")
    figure.set_size_inches(11, 5)
    for axis in axes:
        axis.set(xscale="log", xlabel="k", xticks=(k := RANKS[1:-1]), xticklabels=k)
        axis.minorticks_off()
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return save(args, "spectrum", data, figure)


if __name__ == "__main__":
    main()
