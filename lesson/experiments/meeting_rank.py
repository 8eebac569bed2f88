"""At which rank does LoRA meet full fine-tuning? `python -m lesson.experiments.meeting_rank`

The runs of exercise 12 (docs/exercises.md), and of its solution.
Varied: the method, the rate of full fine-tuning, and LoRA's rank and alpha.
Fixed: mini, the default book, LoRA on all four layers at lr 3e-3, 8 steps of 4 windows of 128
tokens, seed 0.
Measured: the validation perplexity after the last step.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from lesson.experiments.common import as_command, experiment
from lesson.experiments.sweep import ALL, at_the_end, finetune


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the perplexities of full fine-tuning by rate, and of LoRA by rank."""

    def run(method: str, lr: float, **options: Any) -> float:
        [result] = finetune(method, (0,), args.short, max_steps=8, lr=lr, **options)
        return at_the_end(result)

    def lora(r: int, alpha: int) -> float:
        return run("lora", 3e-3, r=r, lora_alpha=alpha, target_modules=ALL)

    return {
        "full": {"1.5e-4": run("full", 1.5e-4), "1e-3": run("full", 1e-3)},
        "alpha = 2 r": {str(r): lora(r, 2 * r) for r in (1, 2, 4, 8, 16, 32)},
        "alpha = 16": {str(r): lora(r, 16) for r in (1, 4, 16)},
    }


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("meeting_rank", measure, None, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
