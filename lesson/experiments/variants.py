"""Which variant of LoRA? `python -m lesson.experiments.variants`

Varied: the variant, each variant at the best learning rate.
Fixed: mini, the default book, all four layers, rank 8, alpha 16, 60 steps of 4 windows of 128
tokens.
Measured: the validation perplexity, with three seeds at the best rate and the two rates beside it.
"""

from collections.abc import Sequence

from lesson.experiments.common import as_command
from lesson.experiments.sweep import ALL, Choice, compare

# A variant's name: the first rate to try, and the variant's options.
CHOICES: dict[str, Choice] = {
    "LoRA": (8e-3, {}),
    "rsLoRA": (4e-3, {"use_rslora": True}),
    "DoRA": (8e-3, {"use_dora": True}),
    "PiSSA": (2e-3, {"init_lora_weights": "pissa"}),
}

SIZE = {"r": 8, "lora_alpha": 16, "target_modules": ALL}


def main(argv: Sequence[str] | None = None) -> dict:
    choices = {label: (guess, SIZE | options) for label, (guess, options) in CHOICES.items()}
    title = "Which variant of LoRA? (mini, all four layers of a block, r = 8, alpha 16)"
    caption = "60 steps of 4 windows of 128 tokens."
    return compare("variants", title, caption, choices, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
