"""Show where gradients lie in fp16's and bf16's range: `python -m lesson.experiments.gradients`."""

import numpy as np
import torch

from lesson.experiments.common import (
    BLUE,
    GREY,
    RED,
    YELLOW,
    mean_loss,
    parse,
    save,
    subplots,
    trainer,
)

ZERO, NORMAL = -25, -14  # powers of two: below 2^-25 fp16 rounds to zero, from 2^-14 it is normal
SCALE, LEFT, RIGHT = 16, -32, 20  # GradScaler's first power; those that the picture shows


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    made = trainer(seed=42, short=args.short)
    for name, parameter in made.parameters.items():
        if "lora_B" in name:  # else A's gradient is zero
            torch.nn.init.normal_(parameter, std=0.01)
    mean_loss(made, next(made.batches())).backward()
    gradients = torch.cat([p.grad.flatten() for p in made.parameters.values()]).numpy()
    powers = np.log2(np.abs(gradients) + 2.0**-60)
    figure, axes = subplots(figsize=(9, 4))
    bins = np.arange(LEFT, RIGHT)
    axes.hist(powers, bins, color=RED, alpha=0.8, label="gradients of A and B, one step")
    axes.hist(powers + SCALE, bins, color=BLUE, alpha=0.5, label="the same, loss times $2^{16}$")
    for *ends, colour, alpha, label in (
        (ZERO, NORMAL, YELLOW, 0.3, "fp16 subnormal: fewer bits"),
        (LEFT, ZERO, GREY, 0.3, "fp16: zero"),
        (16, RIGHT, "#30343f", 0.7, "fp16: infinity"),
    ):
        axes.axvspan(*ends, color=colour, alpha=alpha, label=label)
    axes.set(
        xlabel="log2 of a gradient's size",
        ylabel="how many",
        xlim=(LEFT, RIGHT),
        title="Gradients of a LoRA step, and fp16's range (bf16's is wider than the picture)",
    )
    axes.legend(loc="upper left", fontsize=8)
    data = {
        "gradients": len(powers),
        "median_log2": np.median(powers).item(),
        "seed": 42,
        "zero_in_fp16": (powers < ZERO).mean().item(),
        "subnormal_in_fp16": ((powers >= ZERO) & (powers < NORMAL)).mean().item(),
        "below_normal_after_scaling": (powers + SCALE < NORMAL).mean().item(),
    }
    return save(args, "gradients", data, figure)


if __name__ == "__main__":
    main()
