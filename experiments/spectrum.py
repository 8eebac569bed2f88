"""Show a change's rank, and how alike two changes are: `python -m experiments.spectrum`."""

from collections.abc import Iterator
from itertools import pairwise, permutations

import torch
from torch import Tensor

from experiments.common import BLUE, GREY, RED, YELLOW, band, panels, parse, save
from experiments.sweep import tuned
from train import Trainer

RANKS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 0)
TITLES = ("share of the squared norm in\nthe first k singular values",
          "similarity of the first k input or\noutput directions of c_attn, two runs",
          "perplexity of full fine-tuning,\nits change cut to rank k")
CURVES = ((0, "c_attn", ["LoRA"], RED, "-"), (0, "c_attn", ["full"], BLUE, "-"),
          (0, "mlp.c_proj", ["full"], YELLOW, "-"), (0, "c_attn", ["random"], BLUE, "--"),
          (0, "mlp.c_proj", ["random"], YELLOW, "--"), (1, "c_attn", ["full"] * 2, BLUE, "-"),
          (1, "c_attn", ["LoRA", "full"], GREY, "-"), (1, "c_attn", ["LoRA"] * 2, RED, "-"),
          (2, "c_attn", ["LoRA", "full"], GREY, ":"), (2, "c_attn", ["LoRA"] * 2, RED, ":"),
          (1, "c_attn", ["random"] * 2, BLUE, "--"))


def share(values: Tensor) -> Tensor:
    """Return the share of the k largest singular values (blocks, k) in the squared norm, mean."""
    squares = values.square().cumsum(-1)
    return (squares / squares[:, -1:]).mean(0)


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
    seeds = range(2 if args.short else max(2, args.seeds))
    runs = {kind: [tuned(kind, 42 + i, args.short) for i in seeds] for kind in ("full", "LoRA")}
    runs["random"] = [(made, {name: torch.randn_like(change) for name, change in changes.items()})
                      for made, changes in runs["full"]]
    svds = {kind: [{name: torch.linalg.svd(change, full_matrices=False)
                    for name, change in changes.items()} for _, changes in found]
            for kind, found in runs.items()}
    data, (figure, axes) = {}, panels(3, "Fine-tuning's change: its rank, and how alike seeds are")
    for i, target, kinds, colour, line in CURVES:
        stacks = [[torch.stack([(s, vh, u.mT)[i] for n, (u, s, vh) in found.items() if target in n])
                   for found in svds[kind]] for kind in kinds]  # (blocks, k) or (blocks, k, n) each
        y = torch.stack([(share, similarity)[i > 0](*map(list.__getitem__, stacks, order))
                         for order in permutations(seeds, len(kinds))])  # (runs, k)
        y = y[:, :8] if i and "LoRA" in kinds else y  # LoRA's rank
        label = f"{target}: " * (i == 0) + " and ".join(kinds) + ", outputs" * (i == 2)
        data[label] = y.tolist()
        band(axes[min(i, 1)], range(1, y.size(1) + 1), y, colour, label, line)
    y = torch.tensor([[*cut(made, found)] for (made, _), found in
                      zip(runs["full"], svds["full"], strict=True)])
    data["cut"] = dict(zip(RANKS, y.T.tolist(), strict=True))
    band(axes[2], RANKS[1:-1], y[:, 1:-1], BLUE, "cut to rank k", "o-")
    axes[2].axhline(y[:, -1].mean(), color=GREY, linestyle=":", label="cut to rank 0")
    axes[2].axhline(y[:, 0].mean(), color=GREY, linestyle="--", label="uncut")
    figure.set_size_inches(11, 5)
    for axis, title in zip(axes, TITLES, strict=True):
        axis.set(xscale="log", title=title, xlabel="k", xticks=(k := RANKS[1:-1]), xticklabels=k)
        axis.minorticks_off()
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return save(args, "spectrum", data, figure)


if __name__ == "__main__":
    main()
