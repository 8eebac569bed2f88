"""Measure the gain of each operation of model/kernels/fast.py: `python -m benchmarks.operations`.

Each round first takes a training step with all fast operations. Then it takes one step for each
operation, with only this operation replaced by the plain operation. All rounds run in one process.
Ratios of processor times are taken within a round. The command writes them to benchmarks/results.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from timeit import timeit

from torch import nn

from benchmarks import ours
from benchmarks.speed import about, result_file, run_apart, spread
from common.cli import Parser, number, print_table
from common.device import PRECISIONS, Device, tune_process
from common.errors import run_command
from common.files import write_json
from model.gpt2 import GPT2, Attention
from model.kernels.fast import FAST, accelerate
from storage.hub import find_base
from storage.weights import load_config

OPERATIONS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "attention": Attention,
    "loss": GPT2,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.operations", description=__doc__)
    parser.add_argument("--base", metavar="B", help="default: GPT-2 124M with random weights")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=number(int, 1, 30), default=5)
    args = parser.parse_args(argv)
    tune_process(Device.pick("cpu"))

    ratios = {}  # "LoRA, fp32" -> operation -> a ratio for each round
    with TemporaryDirectory() as folder:
        if not args.base:
            run_apart("--base", folder)
        _, base = find_base(args.base or folder)
        for method in ("lora", "full"):
            for precision in args.precision:
                name = f"{method.replace('lora', 'LoRA')}, {precision}"
                ratios[name] = measure(base, method, precision, args.rounds)

    operations = [*next(iter(ratios.values()))]
    rows = [[name, *(spread(found[name]) for found in ratios.values())] for name in operations]
    print_table(("plain instead", *ratios), rows)
    words = f"--base {Path(args.base).name} " if args.base else ""
    command = f"python -m benchmarks.operations {words}--rounds {args.rounds}"
    write_json(result_file("operations"), {**about(command), "results": ratios})


def measure(base: Path, method: str, precision: str, rounds: int) -> dict[str, list[float]]:
    """Return the ratios of the step times, one for each round, by replaced operation."""
    options = ours.options(
        method,
        base=base,
        device="cpu",
        precision=precision,
        batch_size=16,
        block_size=min(128, load_config(base).n_positions),
        base_dropout=0.1,
        max_steps=1000,  # only for the schedule
    )
    trainer = ours.Steps(options)
    fast = partial(ours.step, trainer, next(trainer.batches()))
    fast()  # warms up

    steps: dict[str, Callable[[], object]] = {"none": fast}
    for name, kind in OPERATIONS.items():
        steps[name] = partial(run_plain, trainer.model, [kind], fast)
    steps["all"] = partial(run_plain, trainer.model, list(FAST), fast)
    ratios = in_turn(steps, rounds)
    del ratios["none"]  # always 1
    return ratios


def run_plain(
    model: nn.Module, kinds: Sequence[type[nn.Module]], step: Callable[[], object]
) -> None:
    """Run a step with these plain classes, and then restore the fast classes."""
    accelerate(model, {FAST[kind]: kind for kind in kinds})
    try:
        step()
    finally:
        accelerate(model)


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each call once per round, in processor time, which other programs disturb little. Return
    for each call its time in every round, divided by the time of the first call in this round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timeit(call, timer=process_time, number=1))

    first = next(iter(times.values()))
    return {
        name: [mine / base for mine, base in zip(taken, first, strict=True)]
        for name, taken in times.items()
    }


if __name__ == "__main__":
    run_command(main)
