"""Compare target layers at one number of parameters: `python -m lesson.experiments.targets`."""

from lesson.experiments.sweep import compare

# targets, and the rank with which each choice trains 122,880 parameters on mini
RANKS = {
    ("c_attn",): 20,
    ("attn.c_proj",): 40,
    ("c_fc",): 16,
    ("mlp.c_proj",): 16,
    ("c_fc", "mlp.c_proj"): 8,
    ("c_attn", "c_proj", "c_fc"): 5,
}


def main(argv: list[str] | None = None) -> dict:
    choices = {
        f"{', '.join(names)}: r = {r}": (
            (3e-3, 1e-2, 3e-2),
            {"r": r, "lora_alpha": 2 * r, "target_modules": names},
        )
        for names, r in RANKS.items()
    }
    return compare(argv, "targets", "Which layers? 122,880 parameters each (mini)", choices)


if __name__ == "__main__":
    main()
