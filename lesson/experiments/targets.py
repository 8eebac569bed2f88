"""Which layers? `python -m lesson.experiments.targets`

Varied: the layers that LoRA adapts, each choice at the best learning rate.
Fixed: mini, the default book, 122,880 trained parameters, alpha 16, 60 steps of 4 windows of 128
tokens.
Measured: the validation perplexity, with three seeds at the best rate and the two rates beside it.
"""

from collections.abc import Sequence

from lesson.experiments.common import as_command
from lesson.experiments.sweep import Choice, compare

# targets, and the rank that gives each choice 122,880 trained parameters on mini
RANKS: dict[tuple[str, ...], int] = {
    ("c_attn",): 20,
    ("attn.c_proj",): 40,
    ("c_fc",): 16,
    ("mlp.c_proj",): 16,
    ("c_fc", "mlp.c_proj"): 8,
    ("c_attn", "c_proj", "c_fc"): 5,
}
GUESS = 1.6e-2


def main(argv: Sequence[str] | None = None) -> dict:
    choices: dict[str, Choice] = {}
    for names, r in RANKS.items():
        options = {"r": r, "lora_alpha": 16, "target_modules": names}
        choices[f"{', '.join(names)}: r = {r}"] = (GUESS, options)
    title = "LoRA on which layers of a block? (mini, 122,880 trained parameters in each row)"
    caption = (
        "Alpha 16, 60 steps of 4 windows of 128 tokens. c_proj: both attn.c_proj and mlp.c_proj, "
        "so c_attn, c_proj, c_fc are all four layers."
    )
    return compare("targets", title, caption, choices, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
