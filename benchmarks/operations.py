"""Measure what each operation of model/fast.py gains: `python -m benchmarks.operations`.

A training step with all of them, then one with each replaced by its plain twin, round after round
in one process; the ratio of two steps is taken within a round.
"""

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import ours
from benchmarks.speed import run_apart
from benchmarks.speed_report import spread, text
from benchmarks.speed_worker import Task, timed
from common.cli import Parser, number, print_table
from common.device import PRECISIONS, tune_process
from common.errors import run_command
from model.hub import find_base
from model.plain import OPERATIONS, plain_operations
from model.weights import load_config
from train import Trainer

TRAINED = [name for name in OPERATIONS if name != "score"]  # that one is evaluation's
ALL = "all of them"


def main() -> None:
    parser = Parser(prog="benchmarks.operations", description=__doc__.splitlines()[0])
    parser.add_argument("--base", metavar="B", help="default: GPT-2 124M with random weights")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=number(int, 1, 30), default=5)
    args = parser.parse_args()
    tune_process()
    with TemporaryDirectory() as folder:
        if not args.base:
            run_apart(Task("base", folder))
        base = find_base(args.base or folder)[1]
        rows = [row for method, precision in product(("lora", "full"), args.precision)
                for row in measure(base, method, precision, args.rounds)]
    print_table(("plain", "method", "precision", "its step / the fast step"), rows)


def measure(base: Path, method: str, precision: str, rounds: int) -> list[tuple[str, ...]]:
    trainer = ours.make_trainer(ours.options(
        method, "--base", base, "--device", "cpu", "--precision", precision, "--batch-size", 16,
        "--block-size", min(128, load_config(base).n_positions), "--base-dropout", 0.1,
        "--max-steps", 1000))  # the schedule, and not what is run
    batch = next(trainer.batches())
    ours.step(trainer, batch)
    slower = {name: [] for name in (*TRAINED, ALL)}
    for _ in range(rounds):
        fast = seconds(trainer, batch)
        for name in slower:
            with plain_operations(*[name] * (name != ALL)):
                slower[name].append(seconds(trainer, batch) / fast)
    return [(name, method, precision, text(spread(ratios))) for name, ratios in slower.items()]


def seconds(trainer: Trainer, batch: np.ndarray) -> float:
    return timed(lambda: ours.step(trainer, batch), 1, trainer.device)["median"]


if __name__ == "__main__":
    run_command(main)
