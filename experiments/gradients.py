"""Show where gradients lie in fp16's and bf16's range: `python -m experiments.gradients`.

One batch of the default book, LoRA on mini in fp32, B perturbed so that A's gradient is not zero.
Draws docs/figures/gradients.png and saves its data beside it.
"""

import numpy as np
import torch

from common.figures import pyplot
from experiments.common import BLUE, GREY, RED, YELLOW, mean_loss, parse, save, trainer

FP16_SMALLEST, FP16_NORMAL, FP16_LARGEST = -24, -14, 16  # powers of two: subnormal, normal, above
SCALE = 16  # GradScaler starts at 2^16
SEED = 42


def gradients(batch_size: int) -> np.ndarray:
    """Return every trained parameter's gradient in the first step, of the mean loss over tokens."""
    made = trainer(seed=SEED, batch_size=batch_size)
    for key, parameter in made.parameters.items():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    mean_loss(made, next(made.batches())).backward()
    return torch.cat([p.grad.flatten() for p in made.parameters.values()]).numpy()


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    powers = np.log2(np.abs(gradients(2 if args.short else 16)) + 2.0**-60)
    subnormal = (powers >= FP16_SMALLEST - 1) & (powers < FP16_NORMAL)
    save(args, "gradients", {
        "gradients": len(powers), "median_log2": float(np.median(powers)),
        "zero_in_fp16": float((powers < FP16_SMALLEST - 1).mean()),
        "subnormal_in_fp16": float(subnormal.mean()),
        "below_normal_after_scaling": float((powers + SCALE < FP16_NORMAL).mean()),
        "seed": SEED}, draw(powers))


def draw(powers: np.ndarray):
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    bins = np.arange(-45, 20)
    axes.hist(powers, bins, color=RED, alpha=0.8, label="gradients of A and B, one step")
    axes.hist(powers + SCALE, bins, color=BLUE, alpha=0.5, label="the same, loss times $2^{16}$")
    axes.axvspan(FP16_SMALLEST, FP16_NORMAL, color=YELLOW, alpha=0.3,
                 label="fp16 subnormal: fewer bits")
    axes.axvspan(-45, FP16_SMALLEST, color=GREY, alpha=0.3, label="fp16: zero")
    axes.axvspan(FP16_LARGEST, 20, color="#30343f", alpha=0.4, label="fp16: infinity")
    axes.set(xlabel="log2 of a gradient's size", ylabel="how many", xlim=(-45, 20),
             title="bf16 reaches from $2^{-133}$ to $2^{128}$: this whole picture and more")
    axes.legend(loc="upper left", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
