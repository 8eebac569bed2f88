"""Measure perplexity by rank under three alpha rules: `python -m lesson.experiments.rank`."""

import torch

from lesson.experiments.common import BLUE, GREY, RED, YELLOW, band, panels, parse, save
from lesson.experiments.sweep import finetune

# the rules for alpha agree at rank 8, where each gives the scaling s = 2
RULES = {
    "alpha = 16: s = 16 / r": (RED, lambda r: 16),
    "alpha = 2 r: s = 2": (BLUE, lambda r: 2 * r),
    "rsLoRA: s = 5.66 / sqrt(r)": (YELLOW, lambda r: 2 * 8**0.5),
}
LR, FULL_LR = 1e-2, 1e-3  # the best that experiments.learning_rate finds at rank 8


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    figure, (axis,) = panels(f"The rank, and the rule for the scaling s (c_attn, lr {LR:g})")
    data, ranks = {}, (1, 64) if args.short else (1, 2, 8, 32, 64)
    for rule, (colour, alpha) in RULES.items():
        data[rule] = {
            r: finetune(
                "lora",
                args.seeds,
                args.short,
                lr=LR,
                r=r,
                lora_alpha=alpha(r),
                use_rslora=rule.startswith("rsLoRA"),
            )
            for r in ranks
        }
        band(axis, ranks, torch.tensor([*data[rule].values()]).T, colour, rule)
    full = data["full"] = finetune("full", args.seeds, args.short, lr=FULL_LR)
    axis.axhline(
        sum(full) / len(full), color=GREY, linestyle="--", label=f"full fine-tuning, lr {FULL_LR:g}"
    )
    axis.set(xscale="log", xlabel="rank r", ylabel="validation perplexity")
    axis.set_xticks(ranks, ranks)
    axis.minorticks_off()
    axis.legend()
    return save(args, "rank", data, figure)


if __name__ == "__main__":
    main()
