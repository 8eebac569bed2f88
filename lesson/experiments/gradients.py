"""Which gradients does fp16 lose? `python -m lesson.experiments.gradients`

Varied: the loss before the gradients, with and without the factor of GradScaler.
Fixed: mini, LoRA on c_attn at rank 8, one batch of the default book, seed 0. B is drawn at
random, because A's gradient is zero while B is zero.
Measured: the sizes of all gradients of A and B, and the shares that fp16 would round to zero or
store with fewer bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from common.figures import INK, LORA
from lesson.experiments.common import as_command, experiment, gradient, mean_loss, panels, trainer
from lesson.figures import draw_at, name_line, shades

# Powers of two. fp16 rounds values below ZERO to zero, stores values below NORMAL with fewer bits,
# and overflows from INFINITY on.
ZERO = -25
NORMAL = -14
INFINITY = 16
SCALE = 16  # GradScaler starts at 2^16

# The ends of the picture's axis.
LEFT = -32
RIGHT = 21
TICKS = (ZERO, NORMAL, 0, INFINITY)
ZONES = {
    (LEFT, ZERO): ("#d3d5d9", "fp16: zero"),
    (ZERO, NORMAL): ("#e9eaec", "fp16: fewer bits\n(subnormal)"),
    (NORMAL, INFINITY): ("#ffffff", "fp16: all its bits"),
    (INFINITY, RIGHT): ("#d3d5d9", "infinity"),
}

SEED = 0


def gradient_powers() -> np.ndarray:
    """Return log2 of the size of each gradient of A and B."""
    made = trainer(seed=SEED)
    for name, parameter in made.parameters.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    mean_loss(made, next(made.batches())).backward()
    gradients = torch.cat([gradient(p).flatten() for p in made.parameters.values()]).numpy()
    return np.log2(np.abs(gradients) + 2.0**-60)  # places a gradient of 0 far to the left


def measure() -> dict[str, Any]:
    powers = gradient_powers()
    found, counts = np.unique(np.floor(powers), return_counts=True)
    return {
        "gradients": len(powers),
        "median_log2": np.median(powers).item(),
        "seed": SEED,
        "zero_in_fp16": (powers < ZERO).mean().item(),
        "subnormal_in_fp16": ((powers >= ZERO) & (powers < NORMAL)).mean().item(),
        "below_normal_after_scaling": (powers + SCALE < NORMAL).mean().item(),
        "floor_log2": dict(zip(found.astype(int).tolist(), counts.tolist(), strict=True)),
    }


def draw(data: dict[str, Any]) -> Any:
    """Draw the number of gradients at each power of two, unscaled and scaled, over fp16's zones."""
    figure, (axis,) = panels(
        "The gradients of a LoRA step, and the range of fp16",
        "mini, LoRA on c_attn at rank 8, one batch of windows of 128 tokens, seed "
        f"{data['seed']}, B random. bf16 covers more than the picture.",
    )
    highest = max(data["floor_log2"].values())
    for (start, end), (colour, words) in ZONES.items():
        axis.axvspan(start, end, color=colour, linewidth=0)
        name_line(axis, words, (start, 1.2 * highest), INK)

    dark, light = shades(LORA, 2)
    for shift, colour in ((0, light), (SCALE, dark)):
        places = [int(power) + 0.5 + shift for power in data["floor_log2"]]
        axis.bar(places, data["floor_log2"].values(), 0.9, color=colour)
    share = 100 * (data["zero_in_fp16"] + data["subnormal_in_fp16"])
    unscaled = f"of A and B:\n{share:.2g} % lose bits"
    share = 100 * data["below_normal_after_scaling"]
    scaled = f"with the loss\ntimes 2^{SCALE}:\n{share:.2g} % lose bits"
    peak = data["median_log2"]
    name_line(axis, unscaled, (peak - 3.5, 0.7 * highest), LORA, (0, 0), "right")
    name_line(axis, scaled, (peak + SCALE + 3, 0.7 * highest), LORA, (0, 0))

    axis.set(xlabel="size of a gradient (log)", ylabel="gradients per bar", xlim=(LEFT, RIGHT))
    axis.set_ylim(0, 1.35 * highest)
    axis.grid(visible=False)
    draw_at(axis.xaxis, TICKS, [f"2^{power}" for power in TICKS])
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("gradients", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
