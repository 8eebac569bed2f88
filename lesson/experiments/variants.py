"""Which variant of LoRA? `python -m lesson.experiments.variants`

Varied: the variant, each at four learning rates.
Fixed: mini, the default book, c_attn at rank 8, alpha 16, 60 steps of 8 windows of 64 tokens.
Measured: the validation perplexity at each variant's best rate, with three seeds.
"""

from collections.abc import Sequence

from lesson.experiments.common import parse
from lesson.experiments.sweep import Choice, compare

RATES = (1e-3, 3e-3, 1e-2, 3e-2)

# A variant that takes larger steps at the same rate is tried at lower rates, and vice versa.
CHOICES: dict[str, Choice] = {
    "LoRA": (RATES, {}),
    "rsLoRA": (RATES, {"use_rslora": True}),
    "DoRA": (RATES, {"use_dora": True}),
    "PiSSA": (RATES, {"init_lora_weights": "pissa"}),
    "LoRA+, ratio 16": ((3e-4, 1e-3, 3e-3, 1e-2), {"loraplus_lr_ratio": 16.0}),
    "LoRA-FA": ((1e-2, 3e-2, 1e-1, 3e-1), {"freeze_a": True}),
    "q and v apart": ((3e-3, 1e-2, 3e-2, 1e-1), {"target_modules": ("c_attn.q", "c_attn.v")}),
}


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    return compare(args, "variants", "Variants of LoRA (mini, c_attn, r = 8, 60 steps)", CHOICES)


if __name__ == "__main__":
    main()
