"""Does this project compute LoRA as PEFT does? Train in both, and compare number by number.

`python -m benchmarks.parity` trains one base on one book twice, once with `train.py` and once with
the loop in `peft_loop.py`. Both start from the same adapter and see the same batches. With plain
kernels, `train.py` must equal that loop bit for bit. With fast kernels, `train.py` must come close.
The check exits with 1 if a figure is above its limit.
"""

import math
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import ours, peft_loop
from benchmarks.parity_report import Report, largest, machine, relative, root_mean_square
from benchmarks.parity_runs import (
    NO_DROPOUT,
    Result,
    arguments,
    run_here,
    to_the_bit,
    train_both,
    train_here,
    train_options,
    train_there,
)
from common.cli import DEVICE_OPTION, Parser, number
from common.device import Device
from common.errors import UserError, run_command
from storage.hub import find_base
from storage.weights import load_config
from training.options import BOOK, Options

CLOSE = 1e-5  # relative: the same computation with sums in another order
LAST_BIT = 2.0**-23  # relative: fp32's unit in the last place
DRAWS = (1, 2, 3)  # seeds of the PEFT runs whose spread is measured
PLAIN = ("--kernels", "plain", "--device", "cpu")
RESUMED_STEPS = 10
Sources = dict[str, tuple[Path, Path | None]]  # name -> a base, and an adapter for that base


def main(argv: Sequence[str] | None = None) -> int:
    opts = parse_args(argv)
    device = Device.pick(opts.device)
    device.set_tf32(False)
    print(
        f"base {opts.name}, up to {opts.steps} steps of {opts.batch_size} x {opts.block_size} "
        f"tokens, {machine()}; here: this project, there: PEFT and transformers"
    )

    began = time.perf_counter()
    report = Report()
    compare(opts, report)
    seconds = time.perf_counter() - began

    report.facts |= {"base": opts.name, "book": opts.book.name, "batch_size": opts.batch_size}
    report.facts |= {"block_size": opts.block_size, "device": device.name}
    report.write(opts.out)
    broken = report.broken()
    if broken:
        print(f"\nparity is broken: {'; '.join(broken)}")
        return 1
    print(f"\nparity holds: {len(report.checks)} checks in {seconds:.0f} s")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmarks.parity", description=__doc__)
    parser.add_argument("--base", default="mini", metavar="B", help="as train.py's (default: mini)")
    parser.add_argument("--book", type=Path, default=BOOK, help="UTF-8 text file")
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        default=50,
        help="an epoch at most; far fewer leave the spread of PEFT's seeds to chance",
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=2)
    parser.add_argument("--block-size", type=number(int, 1), default=128)
    device: dict[str, Any] = {**DEVICE_OPTION, "help": "of all but the bit-exact part (CPU)"}
    parser.add_argument("--device", **device)
    parser.add_argument("--exact-only", action="store_true", help="only the bit-exact part")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="where parity.json goes",
    )
    opts = parser.parse_args(argv)

    base, opts.directory = find_base(opts.base)
    opts.name = Path(base).name
    if opts.block_size >= load_config(opts.directory).n_positions:
        raise UserError(
            f"--block-size {opts.block_size}: must be below the base's n_positions, "
            "for transformers' own loss needs one token more"
        )
    return opts


def compare(opts: Namespace, report: Report) -> None:
    """Run every part of the check, or only the bit-exact part."""
    warnings.simplefilter("ignore", FutureWarning)  # libraries warn about each other
    with TemporaryDirectory() as name:
        folder = Path(name)
        there = exact(opts, report, folder)
        if opts.exact_only:
            return
        exchange(opts, report, folder, there)
        resume(opts, report, folder)
    trained_path(opts, report)
    full(opts, report)


@to_the_bit()
def exact(opts: Namespace, report: Report, folder: Path) -> Result:
    """Check fp32 on one thread. Every bit that `train.py --kernels plain` writes to `folder`/ours
    must equal PEFT's run. Return the result of PEFT's run.
    """
    argv = arguments(opts, "lora", *PLAIN, "--log-every", 1, "--out", folder / "ours")
    args = ours.options(*argv)
    print(
        f"\nexact: fp32, CPU, one thread, dropout {args.base_dropout} in the base and "
        f"{args.lora_dropout} in LoRA"
    )
    here, counted = run_here(argv)
    there = train_there(args)

    compare_counts(report, counted, there)
    compare_exactly(report, "exact", here, there)
    # PEFT's side minimises a mean. A sum divided by the number of tokens may round differently.
    assert there.means is not None
    report.check(
        "exact: loss of every step, by cross_entropy's mean there, relative",
        relative(here.losses, there.means),
        LAST_BIT,
    )
    return there


def compare_counts(report: Report, counted: dict[str, Any], there: Result) -> None:
    numbers = {"trainable": counted["trainable_parameters"], "all": counted["total_parameters"]}
    report.facts["parameters"] = numbers
    theirs = there.model.get_nb_trainable_parameters()
    for (kind, n), m in zip(numbers.items(), theirs, strict=True):
        report.check(f"{kind} parameters, {n:,} here and {m:,} there", abs(n - m), 0)


def compare_exactly(report: Report, name: str, here: Result, there: Result) -> None:
    report.curve(name, here.losses, there.losses)
    report.check(f"{name}: adapter before the first step", largest(here.initial, there.initial), 0)
    report.check(f"{name}: loss of every step", relative(here.losses, there.losses), 0)
    report.check(f"{name}: adapter after the last step", largest(here.adapter, there.adapter), 0)


def exchange(opts: Namespace, report: Report, folder: Path, there: Result) -> None:
    """Let each side read the other side's files: adapters and merged models."""
    print("\nfiles exchanged: validation loss (perplexity), each file scored by both sides")
    there.model.save_pretrained(folder / "peft")
    trained_here = ours.load(opts.directory, folder / "ours", Device.pick("cpu", "fp32"))
    ours.save_merged(trained_here, folder / "ours merged")
    there.model.merge_and_unload().save_pretrained(folder / "peft merged")

    base: Sources = {"base": (opts.directory, None)}
    compare_readings(opts, report, "base", base)
    trained: Sources = {
        "trained there": (opts.directory, folder / "peft"),
        "trained here": (opts.directory, folder / "ours"),
        "trained and merged there": (folder / "peft merged", None),
        "trained and merged here": (folder / "ours merged", None),
    }
    compare_readings(opts, report, "adapter", trained)


@torch.no_grad()
def compare_readings(opts: Namespace, report: Report, what: str, sources: Sources) -> None:
    """Check that these files describe the same model. Compare the validation losses of both
    evaluators, and the logits of both sides on the first window.
    """
    device = Device.pick(opts.device, "fp32")
    _, validation = ours.data(train_options(opts, "lora"))
    tokens = validation.tokens
    window = torch.from_numpy(tokens[None, : opts.block_size].astype(np.int64))
    window = window.to(device.torch_device)

    losses: list[float] = []
    logits: list[Tensor] = []  # each (1, T, V)
    for name, (base, adapter) in sources.items():
        here = ours.load(base, adapter, device)
        there = peft_loop.load(base, adapter).to(device.torch_device)
        scores = {
            "here": ours.evaluate(here, validation, device, opts.block_size).loss,
            "there": peft_loop.evaluate(there, tokens, opts.block_size),
        }
        cells = [f" {side} {loss:.7f} ({math.exp(loss):.5f}) " for side, loss in scores.items()]
        print(f"    {name:25}{''.join(cells)}")
        report.facts.setdefault("validation_losses", {})[name] = scores

        losses += scores.values()
        logits += [here(window).cpu(), there(input_ids=window).logits.cpu()]

    report.check(f"{what}: validation losses, relative", np.ptp(losses) / min(losses), CLOSE)
    reference = logits[1]  # the first source, as PEFT's side reads it
    difference = (torch.stack(logits) - reference).abs().max()
    report.check(
        f"{what}: logits, relative to the largest",
        (difference / reference.abs().max()).item(),
        CLOSE,
    )


@to_the_bit()
def resume(opts: Namespace, report: Report, folder: Path) -> None:
    """Continue here from PEFT's saved adapter, and continue in PEFT from our saved adapter."""
    print(f"\nresumed: {RESUMED_STEPS} more steps, each side from the other's adapter file")
    more = (*PLAIN, "--max-steps", RESUMED_STEPS, "--init-adapter")
    here = train_here(train_options(opts, "lora", *more, folder / "peft"))
    there = train_there(train_options(opts, "lora", *more, folder / "ours"))
    compare_exactly(report, "resumed", here, there)


def trained_path(opts: Namespace, report: Report) -> None:
    """Check the usual way to train, on any device, with all threads, in fp32 and bf16 or fp16."""
    device = Device.pick(opts.device)
    low = device.precision if device.is_cuda else "bf16"  # fp16 if the GPU lacks bf16
    print(f"\nas trained: {device.name}, {torch.get_num_threads()} threads")

    here, fp32 = train_both(train_options(opts, "lora", *NO_DROPOUT))
    report.curve("fp32, no dropout", here.losses, fp32.losses)
    difference = relative(here.losses, fp32.losses)
    report.check("fp32, no dropout: loss of every step, relative", difference, CLOSE)
    compare_independent_draws(report, train_options(opts, "lora"))

    here, there = train_both(train_options(opts, "lora", "--precision", low, *NO_DROPOUT))
    report.curve(f"{low}, no dropout", here.losses, there.losses)
    compare_rounding(report, low, here.losses, there.losses, fp32.losses)
    compare_independent_draws(report, train_options(opts, "lora", "--precision", low))


def compare_rounding(
    report: Report, precision: str, here: list[float], there: list[float], fp32: list[float]
) -> None:
    """Allow twice the difference that rounding makes on PEFT's side, because both sides round.

    Also compare root mean squares, because only they show a small difference in every step.
    """
    name = f"{precision}, no dropout: loss"
    largest_difference = relative(here, there)
    report.check(f"{name} of every step, relative", largest_difference, 2 * relative(there, fp32))
    difference = root_mean_square(np.subtract(here, there))
    rounding = root_mean_square(np.subtract(there, fp32))
    report.check(f"{name}, root mean square of the difference", difference, 2 * rounding)


def compare_independent_draws(report: Report, args: Options) -> None:
    """Compare runs with independent dropouts. This project's curve may differ from the mean of
    PEFT's curves as much as PEFT's curves differ from each other. Both differences are root mean
    squares over the steps.
    """
    here = train_here(args)
    curves = np.array([train_there(args, draws).losses for draws in DRAWS])
    mean = curves.mean(axis=0)
    spread = np.ptp(curves, axis=0)

    name = f"{args.precision}, independent dropout"
    report.curve(name, here.losses, mean.tolist(), spread=spread.tolist())
    report.check(
        f"{name}: loss, from PEFT's mean",
        root_mean_square(here.losses - mean),
        root_mean_square(spread),
    )


def full(opts: Namespace, report: Report) -> None:
    """Train all weights. Transformers stores four weights per block transposed, so gradients add up
    in another order and round differently. Where a gradient is tiny, Adam turns this difference
    into a whole step.
    """
    print("\nfull fine-tuning, fp32, no dropout")
    here, there = train_both(train_options(opts, "full", "--base-dropout", "0"))
    report.curve("full", here.losses, there.losses)
    report.check("full: loss of every step, relative", relative(here.losses, there.losses), CLOSE)


if __name__ == "__main__":
    run_command(main)
