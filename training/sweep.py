"""Train once for each learning rate, rank and seed, and compare: `make sweep`.

Each run is a `train.py` in a process of its own. The same command resumes a sweep: train.py leaves
a finished run as it is, and refuses it if its options differ.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from common.cli import Parser, print_table
from common.errors import run_command
from common.figures import (
    INK,
    METHODS,
    PAGE_WIDTH,
    can_draw,
    draw_at,
    save_figure,
    scientific,
    shades,
    subplots,
)
from common.files import atomic_path
from common.signals import HANDLED, on_signals
from training.compare import SWEEP_PICTURE, SWEEP_TABLE
from training.directory import METRICS
from training.options import DEFAULTS, ROOT, parse_options
from training.report import perplexity, read_run

COLUMNS = ("runs", "val loss", "min .. max", "perplexity", "min .. max")


class Setting(NamedTuple):
    """What the runs of one row share; they differ in their seeds. Full fine-tuning has no rank."""

    lr: float
    r: int | None


class PlannedRun(NamedTuple):
    """A run of `train.py` with these arguments, which leaves its results in `out`."""

    r: int | None
    out: Path
    arguments: list[str]


def plan(args: argparse.Namespace, others: list[str]) -> list[PlannedRun]:
    """Return a run for each learning rate, rank and seed; `others` are options of them all.

    Raises UserError if `train.py` would refuse the options of one.
    """
    default = parse_options("-", [args.method, *others])
    rates = args.lr or [default.lr]
    ranks = args.r or [None]
    seeds = args.seed or [default.seed]
    planned = []
    for lr, r, seed in product(_unique(rates), _unique(ranks), _unique(seeds)):
        options = []
        if lr is not None:
            options.append(f"lr={lr}")
        if r is not None:
            options.append(f"r={r}")
        options.append(f"seed={seed}")
        out = args.out / ",".join(options)
        flags = [f"--{option}" for option in options]
        arguments = [args.method, *others, *flags, f"--out={out}"]
        parse_options("-", arguments)  # a mistake ends the sweep before its first run
        planned.append(PlannedRun(r, out, arguments))
    return planned


def _unique(values: Sequence) -> list:
    """Return the values, each once: a value given twice is one run."""
    return list(dict.fromkeys(values))


def train(arguments: list[str], out: Path) -> int:
    """Run train.py; return its exit status, or that of a signal which came meanwhile."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    if (out / METRICS).exists() and "--overwrite" not in arguments:
        command.append("--resume")
    child = subprocess.Popen(command)
    stops = []  # a child may still end with 0: its last step was done

    def stop(number: int, frame: object) -> None:
        stops.append(128 + number)
        if number != signal.SIGINT:  # a terminal's SIGINT also reaches the child
            child.send_signal(number)

    before = {number: signal.getsignal(number) for number in HANDLED}
    on_signals(stop)
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return stops[0] if stops else status


def report(method: str, losses: Mapping[Setting, Sequence[float]], out: Path) -> None:
    """Print the table and write it to `sweep.md`; draw `sweep.png`."""
    perplexities = {
        setting: [perplexity(loss) for loss in values] for setting, values in losses.items()
    }
    rows = []
    for setting, values in losses.items():
        name = f"lr {setting.lr:g}"
        if setting.r:
            name += f", r {setting.r}"
        cells = spread(values, digits=4) + spread(perplexities[setting], digits=2)
        rows.append([name, str(len(values)), *cells])
    text = print_table((method, *COLUMNS), rows)
    with atomic_path(out / SWEEP_TABLE) as temporary:
        temporary.write_text(text + "\n")
    if can_draw():
        draw(method, perplexities, out / SWEEP_PICTURE)


def spread(values: Sequence[float], digits: int) -> list[str]:
    """Return two cells: the mean, and the range from the minimum to the maximum."""
    least = f"{min(values):.{digits}f}"
    most = f"{max(values):.{digits}f}"
    return [f"{mean(values):.{digits}f}", f"{least} .. {most}"]


def draw(method: str, perplexities: Mapping[Setting, Sequence[float]], path: Path) -> None:
    """Draw perplexity against learning rate: a line per rank, with bars from least to most."""
    means = {setting: mean(values) for setting, values in perplexities.items()}
    figure, axes = subplots(figsize=(PAGE_WIDTH, 4.5))
    ranks = list(dict.fromkeys(setting.r for setting in perplexities))
    for rank, colour in zip(ranks, shades(METHODS[method], len(ranks)), strict=True):
        line = sorted(setting for setting in perplexities if setting.r == rank)
        below = [means[setting] - min(perplexities[setting]) for setting in line]
        above = [max(perplexities[setting]) - means[setting] for setting in line]
        axes.errorbar(
            [setting.lr for setting in line],
            [means[setting] for setting in line],
            [below, above],
            marker="o",
            capsize=4,
            color=colour,
            label=f"r = {rank}" if rank else None,
        )
    best = min(means, key=means.__getitem__)
    axes.plot(
        best.lr,
        means[best],
        "*",
        color=INK,
        markersize=18,
        zorder=9,
        label="best mean",
        markerfacecolor="none",
    )
    rates = sorted({setting.lr for setting in perplexities})
    axes.set(
        xscale="log",
        xlabel="peak learning rate",
        ylabel="best validation perplexity",
        title=f"{method}: mean over seeds, with the range from the minimum to the maximum",
    )
    draw_at(axes.xaxis, rates, [scientific(lr) for lr in rates])
    axes.legend()
    save_figure(figure, path)
    print(f"drawn in {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="training.sweep", description=__doc__, epilog="All other options are train.py's."
    )
    parser.add_argument("method", choices=DEFAULTS)
    parser.add_argument("--lr", type=float, nargs="+", metavar="X")
    parser.add_argument("--r", type=int, nargs="+", metavar="N", help="ranks (LoRA only)")
    parser.add_argument("--seed", type=int, nargs="+", metavar="N")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sweep", metavar="DIR")
    args, others = parser.parse_known_args(argv)
    others = [word for word in others if word != "--resume"]  # `train` adds it where it is due

    losses: dict[Setting, list[float]] = {}
    failed = False
    for planned in plan(args, others):
        print(f"--- {planned.out.name}", flush=True)
        status = train(planned.arguments, planned.out)
        if status > 128:  # a signal's
            print("the same command, without --overwrite, resumes the sweep", file=sys.stderr)
            return status
        if status:
            print(f"error: {planned.out.name}: exit status {status}", file=sys.stderr)
            failed = True
        else:
            run = read_run(planned.out)
            setting = Setting(run["options"]["lr"], planned.r)
            losses.setdefault(setting, []).append(run["best_val_loss"])
    if losses:
        report(args.method, losses, args.out)
    return int(failed)


if __name__ == "__main__":
    run_command(main)
