"""Are changes of low rank? `python -m lesson.experiments.spectrum`

Varied: the method (full fine-tuning, LoRA on c_attn at rank 8) and the seed, which sets A and the
order of the windows. The comparison is random matrices of the same shapes.
Fixed: mini, the default book, 60 steps of 4 windows of 128 tokens, lr 8e-3 for LoRA and 1e-3 for
full fine-tuning.
Measured: the singular values of the change of each matrix, and the validation perplexity with the
change of full fine-tuning cut to rank k.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.figures import BASE, FULL, LORA
from lesson.experiments.common import (
    SEEDS,
    Steps,
    as_command,
    band,
    describe_seeds,
    experiment,
    panels,
    trainer,
)
from lesson.experiments.sweep import SIZE, train
from lesson.figures import RANDOM, draw_at, name_line, shades
from lora.inject import lora_layers

RUN = "LoRA: c_attn, rank 8, lr 8e-3. Full: lr 1e-3. 60 steps of 4 windows of 128 tokens."

SVDs = dict[str, Any]  # name of a matrix -> U, S and Vh of the change

RANKS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 0)

# The curves in the left panel of spectrum.png: matrices, change, and line style.
SHARES = {
    "c_attn: LoRA": ("c_attn", "LoRA", LORA, "-"),
    "c_attn: full": ("c_attn", "full", FULL, "-"),
    "mlp.c_proj: full": ("mlp.c_proj", "full", shades(FULL, 2)[1], "-"),
    "c_attn: random": ("c_attn", "random", RANDOM, ":"),
    "mlp.c_proj: random": ("mlp.c_proj", "random", RANDOM, "-."),
}


def tuned(method: str, seed: int) -> tuple[Steps, dict[str, Tensor]]:
    """Train LoRA on c_attn at lr 8e-3, or all weights ("full") at 1e-3.

    Returns the trainer, and the change of each changed block matrix by name.
    """
    lr = {"LoRA": 8e-3, "full": 1e-3}[method]
    made = trainer(method.lower(), seed, lr=lr, **SIZE)
    base = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    train(made)
    layers = lora_layers(made.model)
    if layers:
        return made, {name: layer.delta_weight() for name, layer in layers.items()}
    matrices = {
        n: p for n, p in made.model.named_parameters() if n.startswith("h.") and p.ndim == 2
    }
    return made, {name: p.detach() - base[name] for name, p in matrices.items()}


def decomposed(changes: dict[str, Tensor]) -> SVDs:
    """Return the singular value decomposition of each change."""
    return {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}


def randomised(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random matrices with the shapes of the changes."""
    return {name: torch.randn_like(change) for name, change in changes.items()}


def singular_values(svds: SVDs, target: str) -> Tensor:
    """Return the singular values of the change of the target in each block, (blocks, k)."""
    return torch.stack([svd.S for name, svd in svds.items() if target in name])


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


def rank_ticks(*axes: Any) -> None:
    """Set every axis to k from 1 to 256, in powers of two."""
    for axis in axes:
        axis.set(xscale="log", xlabel="k", xlim=(0.9, 285))
        draw_at(axis.xaxis, RANKS[1:-1])


def measure() -> dict[str, Any]:
    full = [tuned("full", seed) for seed in SEEDS]
    lora = [tuned("LoRA", seed) for seed in SEEDS]
    random = [randomised(changes) for _, changes in full]
    svds = {
        "full": [decomposed(changes) for _, changes in full],
        "LoRA": [decomposed(changes) for _, changes in lora],
        "random": [decomposed(changes) for changes in random],
    }

    data: dict[str, Any] = shares_of_the_norm(svds)
    models = [made for made, _ in full]
    cuts = [cut(made, run) for made, run in zip(models, svds["full"], strict=True)]
    data["cut"] = {k: list(runs) for k, *runs in zip(RANKS, *cuts, strict=True)}
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("spectrum", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
