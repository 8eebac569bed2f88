"""How much does full fine-tuning forget at 5e-4? `python -m lesson.experiments.best_full_rate`

This is the best rate tried in `lesson.experiments.scaling`. `intruders` has other rates.
Fixed: mini, the default book, 60 steps of 4 windows of 128 tokens, three seeds.
Measured: what `intruders` measures.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from lesson.experiments.common import as_command, experiment
from lesson.experiments.intruders import Runs, measured

RUNS: Runs = {"full, half the rate": ("full", {"lr": 5e-4})}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return measured(RUNS, args)


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("best_full_rate", measure, None, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
