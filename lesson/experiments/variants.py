"""Variants of LoRA side by side, each at its best rate: `python -m lesson.experiments.variants`."""

from lesson.experiments.sweep import compare

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CHOICES = {
    "LoRA": (RATES, {}),
    "rsLoRA": (RATES, {"use_rslora": True}),
    "DoRA": (RATES, {"use_dora": True}),
    "PiSSA": (RATES, {"init_lora_weights": "pissa"}),
    "LoRA+, ratio 16": ((3e-4, *RATES[:-1]), {"loraplus_lr_ratio": 16.0}),
    "LoRA-FA": ((1e-2, 3e-2, 1e-1, 3e-1), {"freeze_a": True}),
    "q and v apart": ((*RATES[1:], 1e-1), {"target_modules": ("c_attn.q", "c_attn.v")}),
}


def main(argv: list[str] | None = None) -> dict:
    return compare(argv, "variants", "Variants of LoRA (mini, c_attn, r = 8, 60 steps)", CHOICES)


if __name__ == "__main__":
    main()
