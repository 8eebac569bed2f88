"""Which rank, and which scaling? `python -m lesson.experiments.rank`

Varied: the rank r of LoRA on c_attn, and the rule that sets the scaling s of B A by the rank.
Fixed: mini, the default book, lr 1e-2, 60 steps of 8 windows of 64 tokens, three seeds.
Measured: the validation perplexity; beside it full fine-tuning's at its own best rate.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch

from common.figures import FULL, LORA, shades
from lesson.experiments.common import band, panels, parse, save
from lesson.experiments.sweep import finetune

SHADES = shades(LORA, 3)

# The rules agree at rank 8, where each gives s = 2. s is alpha / r, or alpha / sqrt(r) for rsLoRA.
RULES: dict[str, tuple[str, Callable[[int], float]]] = {
    "alpha = 16: s = 16 / r": (SHADES[0], lambda r: 16),
    "alpha = 2 r: s = 2": (SHADES[1], lambda r: 2 * r),
    "rsLoRA: s = 5.66 / sqrt(r)": (SHADES[2], lambda r: 2 * 8**0.5),
}
RANKS = (1, 2, 8, 32, 64)

# The best rates that lesson.experiments.learning_rate finds: at rank 8, and for full fine-tuning.
LR = 1e-2
FULL_LR = 1e-3


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    ranks = (1, 64) if args.short else RANKS
    data: dict[str, Any] = {}
    for rule, (_, alpha) in RULES.items():
        data[rule] = {}
        for r in ranks:
            options: dict[str, Any] = {
                "r": r,
                "lora_alpha": alpha(r),
                "use_rslora": rule.startswith("rsLoRA"),
            }
            data[rule][r] = finetune("lora", args.seeds, args.short, lr=LR, **options)
    data["full"] = finetune("full", args.seeds, args.short, lr=FULL_LR)

    figure, (axis,) = panels(f"The rank, and the rule for the scaling s (c_attn, lr {LR:g})")
    for rule, (colour, _) in RULES.items():
        y = torch.tensor(list(data[rule].values()))  # (ranks, seeds)
        band(axis, ranks, y.T, colour, rule)
    label = f"full fine-tuning, lr {FULL_LR:g}"
    axis.axhline(mean(data["full"]), color=FULL, linestyle="--", label=label)
    axis.set(xscale="log", xlabel="rank r", ylabel="validation perplexity")
    axis.set_xticks(ranks, ranks)
    axis.minorticks_off()
    axis.legend()
    return save(args, "rank", data, figure)


if __name__ == "__main__":
    main()
