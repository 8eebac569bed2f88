"""Compare the variants' steps with plain LoRA: `python -m benchmarks.variants`.

The command takes a step of each variant in turn with a step of plain LoRA, on mini in fp32 on one
core, and compares the processor times. It also counts the bytes that autograd keeps for the
backward pass of one step, without the parameters. It writes the result to benchmarks/results.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import process_time
from timeit import timeit

import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.speed import about, result_file, spread
from common.cli import Parser, number, print_table
from common.device import Device, tune_process
from common.errors import run_command
from common.files import write_json
from data.windows import Batch
from storage.hub import MINI

VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "layers 3-5": ("--layers", "3-5"),
    "rsLoRA": ("--use-rslora",),
    "DoRA": ("--use-dora",),
    "PiSSA": ("--init-lora-weights", "pissa"),
    "q and v": ("--target-modules", "c_attn.q", "c_attn.v"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.variants", description=__doc__)
    parser.add_argument("--rounds", type=number(int, 1, 100), default=8)
    args = parser.parse_args(argv)
    tune_process(Device.pick("cpu"))
    torch.set_num_threads(1)

    trainers = {}
    for name, more in VARIANTS.items():
        options = ours.options("lora", *more, base=MINI, device="cpu", precision="fp32")
        trainers[name] = ours.Steps(options)
    batch = next(trainers["plain"].batches())

    kept = {name: kept_bytes(trainer, batch) for name, trainer in trainers.items()}  # also warms up
    steps = {name: partial(ours.step, trainer, batch) for name, trainer in trainers.items()}
    ratios = in_turn(steps, args.rounds)
    print_table(
        ("", "its step / plain's", "MB kept for the backward pass"),
        [(name, spread(ratios[name]), f"{kept[name] / 1e6:.1f}") for name in trainers],
    )
    results = {name: {"ratios": ratios[name], "kept_mb": kept[name] / 1e6} for name in trainers}
    command = f"python -m benchmarks.variants --rounds {args.rounds}"
    write_json(result_file("variants"), {**about(command), "results": results})


def kept_bytes(trainer: ours.Steps, batch: Batch) -> int:
    """Return the bytes of the tensors that autograd saves in a step. Each storage counts once."""
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
