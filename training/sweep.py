"""Train with each combination of learning rate, rank and seed, and compare: `make sweep`.

Each run is a `train.py` in a separate process. To resume a sweep, repeat its command: train.py does
not change a finished run, and refuses to resume a run with other options.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean

from common.cli import Parser, print_table
from common.errors import run_command
from common.files import atomic_path
from evaluation.scores import perplexity
from storage.runs import read_run
from training.directory import METRICS
from training.options import DEFAULTS, ROOT, parse_options


def plan(args: argparse.Namespace, others: list[str]) -> dict[Path, list[str]]:
    """Map each run's directory to the arguments of train.py. Raises UserError for options that
    train.py would refuse."""
    default = parse_options("-", [args.method, *others])
    planned = {}
    for values in product(args.lr or [default.lr], args.r or [None], args.seed or [default.seed]):
        named = zip(("lr", "r", "seed"), values, strict=True)
        options = [f"{name}={value}" for name, value in named if value is not None]
        out = args.out / ",".join(options)
        flags = [f"--{option}" for option in options]
        planned[out] = [args.method, *others, *flags, f"--out={out}"]
        parse_options("-", planned[out])  # a wrong option ends the sweep before its first run
    return planned


def train(arguments: list[str], out: Path) -> int:
    """Run train.py, and return its exit status: 128 + n if signal n stopped it."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    if (out / METRICS).exists() and "--overwrite" not in arguments:
        command.append("--resume")
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C also reaches train.py
    ended = subprocess.run(command)
    signal.signal(signal.SIGINT, before)
    return ended.returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="training.sweep", description=__doc__, epilog="Other options are passed to train.py."
    )
    parser.add_argument("method", choices=DEFAULTS)
    parser.add_argument("--lr", type=float, nargs="+", metavar="X")
    parser.add_argument("--r", type=int, nargs="+", metavar="N", help="ranks (LoRA only)")
    parser.add_argument("--seed", type=int, nargs="+", metavar="N")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sweep", metavar="DIR")
    args, others = parser.parse_known_args(argv)
    others = [word for word in others if word != "--resume"]  # `train` adds --resume

    losses: dict[str, list[float]] = {}
    failed = False
    for out, arguments in plan(args, others).items():
        print(f"--- {out.name}", flush=True)
        status = train(arguments, out)
        if status > 128:  # a signal ended train.py
            print("the same command, without --overwrite, resumes the sweep", file=sys.stderr)
            return status
        if status:
            print(f"error: {out.name}: exit status {status}", file=sys.stderr)
            failed = True
        else:
            run = read_run(out)
            lr = run["options"]["lr"] or "searched"
            rank = f", r {run['options']['r']}" if args.r else ""
            losses.setdefault(f"lr {lr}{rank}", []).append(run["best_val_loss"])
    if losses:
        write_table(losses, args.out)
    return int(failed)


def write_table(losses: Mapping[str, Sequence[float]], out: Path) -> None:
    """Print a table, and write it to `sweep.md`. A row has the mean and the range of the losses of
    one setting's runs, and the perplexity of the mean."""
    rows = []
    for setting, values in losses.items():
        spread = f"{min(values):.4f} .. {max(values):.4f}"
        average = mean(values)
        cells = [f"{average:.4f}", spread, f"{perplexity(average):.2f}"]
        rows.append([setting, str(len(values)), *cells])
    table = print_table(["", "runs", "val loss", "min .. max", "perplexity"], rows)
    with atomic_path(out / "sweep.md") as temporary:
        temporary.write_text(table + "\n")


if __name__ == "__main__":
    run_command(main)
