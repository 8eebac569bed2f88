"""Has LoRA intruder dimensions, and do they cost? `python -m lesson.experiments.intruders`

Varied: the method, LoRA's rank and rate; then the factor by which the intruders alone, or the whole
change, are scaled down.
Fixed: mini, the default book, alpha 16, 60 steps of 8 windows of 64 tokens, three seeds.
Measured: how many of the ten largest singular vectors of each changed weight are intruders
(Shuttleworth et al. 2024); the validation perplexity; what was forgotten, by the KL from the base.
"""

from collections.abc import Sequence
from typing import Any

from lesson.experiments.changes import taken_apart
from lesson.experiments.common import parse
from lesson.experiments.sweep import ALL, finetune

# A run's name: its method and its options.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "c_attn, r = 8": ("lora", {"lr": 8e-3}),
    "r = 1": ("lora", {"r": 1, "lr": 8e-3, "target_modules": ALL}),
    "r = 1, half the rate": ("lora", {"r": 1, "lr": 4e-3, "target_modules": ALL}),
    "r = 8": ("lora", {"r": 8, "lr": 8e-3, "target_modules": ALL}),
    "r = 8, half the rate": ("lora", {"r": 8, "lr": 4e-3, "target_modules": ALL}),
    "r = 64": ("lora", {"r": 64, "lr": 8e-3, "target_modules": ALL}),
    "r = 64, half the rate": ("lora", {"r": 64, "lr": 4e-3, "target_modules": ALL}),
    "full": ("full", {"lr": 1e-3}),
    "full, an eighth of the rate": ("full", {"lr": 1.25e-4}),
}


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    measure = taken_apart(args.short)
    data = {}
    for name, (method, options) in RUNS.items():
        data[name] = finetune(method, args.seeds, args.short, measure, **options)
    return data


if __name__ == "__main__":
    main()
