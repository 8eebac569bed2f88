"""Which gradients does fp16 lose? `python -m lesson.experiments.gradients`

Varied: whether the loss is scaled up before its gradients are taken, as GradScaler does.
Fixed: mini, LoRA on c_attn at rank 8, one batch of the default book, seed 42. B is drawn at
random: with the zero B of a new adapter, A's gradient would be zero, too.
Measured: the sizes of all gradients of A and B, and the shares of them that fp16 would round to
zero or store with fewer bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from common.figures import BASE, FULL, LORA, OTHER, subplots
from lesson.experiments.common import gradient, mean_loss, parse, save, trainer

# Powers of two: fp16 rounds to zero what is below ZERO, and stores what is below NORMAL with fewer
# bits; from INFINITY on it overflows.
ZERO = -25
NORMAL = -14
INFINITY = 16
SCALE = 16  # GradScaler's first scale is 2^16

# The picture's ends.
LEFT = -32
RIGHT = 20

SEED = 42


def gradient_powers(short: bool) -> np.ndarray:
    """Return log2 of the size of each gradient of A and B."""
    made = trainer(seed=SEED, short=short)
    for name, parameter in made.parameters.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    mean_loss(made, next(made.batches())).backward()
    gradients = torch.cat([gradient(p).flatten() for p in made.parameters.values()]).numpy()
    return np.log2(np.abs(gradients) + 2.0**-60)  # a gradient of 0 is far to the left


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    powers = gradient_powers(args.short)
    data = {
        "gradients": len(powers),
        "median_log2": np.median(powers).item(),
        "seed": SEED,
        "zero_in_fp16": (powers < ZERO).mean().item(),
        "subnormal_in_fp16": ((powers >= ZERO) & (powers < NORMAL)).mean().item(),
        "below_normal_after_scaling": (powers + SCALE < NORMAL).mean().item(),
    }

    figure, axes = subplots(figsize=(9, 4))
    bins = np.arange(LEFT, RIGHT)
    axes.hist(powers, bins, color=LORA, alpha=0.8, label="gradients of A and B, one step")
    axes.hist(powers + SCALE, bins, color=FULL, alpha=0.5, label="the same, loss times $2^{16}$")
    axes.axvspan(ZERO, NORMAL, color=OTHER, alpha=0.3, label="fp16 subnormal: fewer bits")
    axes.axvspan(LEFT, ZERO, color=BASE, alpha=0.3, label="fp16: zero")
    axes.axvspan(INFINITY, RIGHT, color="#30343f", alpha=0.7, label="fp16: infinity")
    axes.set(
        xlabel="log2 of a gradient's size",
        ylabel="how many",
        xlim=(LEFT, RIGHT),
        title="Gradients of a LoRA step, and fp16's range (bf16's is wider than the picture)",
    )
    axes.legend(loc="upper left", fontsize=8)
    return save(args, "gradients", data, figure)


if __name__ == "__main__":
    main()
