"""Measure what a change to the training step costs: `python -m benchmarks.steps operations`.

`operations` replaces each operation of model/fast.py by its plain twin, on a GPT-2 124M of random
weights; `variants` sets the variants of LoRA beside it, on mini in fp32 and on one core, and adds
the bytes that autograd keeps for the backward pass of one step, without the parameters. All steps
are taken in turn in one process, round after round; a ratio is taken within a round.
"""

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.speed import run_apart
from benchmarks.speed_report import spread, text
from benchmarks.speed_worker import Task, timed
from common.cli import Parser, number, print_table
from common.device import PRECISIONS, tune_process
from common.errors import run_command
from model.hub import MINI, find_base
from model.plain import OPERATIONS, plain_operations
from model.weights import load_config
from train import Trainer

TRAINED = [name for name in OPERATIONS if name != "score"]  # that one is evaluation's
ALL = "all of them"
VARIANTS = {"plain": (), "layers 3-5": ("--layers", "3-5"), "rsLoRA": ("--use-rslora",),
            "DoRA": ("--use-dora",), "PiSSA": ("--init-lora-weights", "pissa"),
            "LoRA-FA": ("--freeze-a",), "q and v": ("--target-modules", "c_attn.q", "c_attn.v")}


def main() -> None:
    parser = Parser(prog="benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("operations", "variants"))
    parser.add_argument("--rounds", type=number(int, 1, 100), default=5)
    parser.add_argument("--base", metavar="B",
                        help="of the operations (default: GPT-2 124M with random weights)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"],
                        help="of the operations (default: fp32 bf16)")
    args = parser.parse_args()
    tune_process()
    if args.what == "variants":
        return variants(args.rounds)
    with TemporaryDirectory() as folder:
        if not args.base:
            run_apart(Task("base", folder))
        base = find_base(args.base or folder)[1]
        rows = [row for method, precision in product(("lora", "full"), args.precision)
                for row in operations(base, method, precision, args.rounds)]
    print_table(("plain", "method", "precision", "its step / the fast step"), rows)


def operations(base: Path, method: str, precision: str, rounds: int) -> list[tuple[str, ...]]:
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


def variants(rounds: int) -> None:
    torch.set_num_threads(1)
    trainers = {name: ours.make_trainer(ours.options(
        "lora", "--base", MINI, "--device", "cpu", "--precision", "fp32", *options))
        for name, options in VARIANTS.items()}
    batch = next(trainers["plain"].batches())
    kept = {name: kept_bytes(trainer, batch) for name, trainer in trainers.items()}  # warms up
    times = [[seconds(trainer, batch) for trainer in trainers.values()] for _ in range(rounds)]
    ratios = zip(*([step / plain for step in (plain, *others)] for plain, *others in times),
                 strict=True)
    print_table(("", "its step / plain's", "MB kept for the backward pass"), [
        (name, text(spread(values)), f"{kept[name] / 1e6:.1f}")
        for name, values in zip(trainers, ratios, strict=True)])


def kept_bytes(trainer: Trainer, batch: np.ndarray) -> int:
    """Return the bytes of the tensors that autograd saves in a step, each storage counted once."""
    found = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        ours.step(trainer, batch)
    for parameter in trainer.model.parameters():
        found.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(found.values())


def seconds(trainer: Trainer, batch: np.ndarray) -> float:
    return timed(lambda: ours.step(trainer, batch), 1, trainer.device)["median"]


if __name__ == "__main__":
    run_command(main)
