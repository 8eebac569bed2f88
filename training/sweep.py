"""Train once for each learning rate, rank and seed, and compare: `make sweep`.

Each run is a `train.py` in a process of its own. The same command resumes a sweep: train.py leaves
a finished run as it is, and refuses it if its options differ.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    from common import signals

    signals.install_exit_handlers()

import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean

from common.cli import Parser, print_table
from common.errors import run_command
from common.figures import can_draw, save_figure, subplots
from common.files import atomic_path
from training.directory import METRICS
from training.options import DEFAULTS, ROOT, parse_options
from training.report import perplexity, read_run

COLUMNS = ("runs", "val loss", "min .. max", "perplexity", "min .. max")


def train(arguments: list[str], out: Path) -> int:
    """Run train.py; return its exit status, or that of a signal which came meanwhile."""
    resume = ["--resume"] if (out / METRICS).exists() and "--overwrite" not in arguments else []
    child = subprocess.Popen([sys.executable, ROOT / "train.py", *arguments, *resume])
    stops = []  # a child may still end with 0: its last step was done

    def stop(number: int, frame) -> None:
        stops.append(128 + number)
        if number == signal.SIGTERM:  # a terminal's SIGINT also reaches the child
            child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return stops[0] if stops else status


def spread(values: list[float], digits: int) -> list[str]:
    least, middle, most = (f"{x:.{digits}f}" for x in (min(values), mean(values), max(values)))
    return [middle, f"{least} .. {most}"]


def draw(method: str, perplexities: dict[tuple, list[float]], best: tuple, path: Path) -> None:
    """Draw perplexity against learning rate: a line per rank, with bars from least to most."""
    figure, axes = subplots(figsize=(7, 4.5))
    for rank in dict.fromkeys(rank for _, rank in perplexities):
        line = {lr: v for (lr, r), v in sorted(perplexities.items()) if r == rank}
        means, *bars = zip(
            *((mean(v), mean(v) - min(v), max(v) - mean(v)) for v in line.values()), strict=True
        )
        axes.errorbar([*line], means, bars, marker="o", capsize=4, label=rank and f"r = {rank}")
    axes.plot(
        best[0],
        mean(perplexities[best]),
        "k*",
        markersize=18,
        zorder=9,
        label="best mean",
        markerfacecolor="none",
    )
    rates = sorted({lr for lr, _ in perplexities})
    axes.set(
        xscale="log",
        xlabel="peak learning rate",
        ylabel="best validation perplexity",
        title=f"{method}: mean over seeds, with the range from the minimum to the maximum",
    )
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
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
    default = parse_options("-", [args.method])
    values = args.lr or [default.lr], args.r or [None], args.seed or [default.seed]
    plan, results, failed = [], {}, False
    for lr, r, seed in product(*map(dict.fromkeys, values)):  # a value given twice is one run
        options = [f"lr={lr}"] + ([] if r is None else [f"r={r}"]) + [f"seed={seed}"]
        out = args.out / ",".join(options)
        plan.append(
            ((lr, r), out, [args.method, *others, *(f"--{x}" for x in options), f"--out={out}"])
        )
        parse_options("-", plan[-1][2])  # a mistake ends the sweep before its first run
    for key, out, arguments in plan:
        print(f"--- {out.name}", flush=True)
        status = train(arguments, out)
        if status in (130, 143):
            print("the same command, without --overwrite, resumes the sweep", file=sys.stderr)
            return status
        if status:
            print(f"error: {out.name}: exit status {status}", file=sys.stderr)
            failed = True
        else:
            results.setdefault(key, []).append(read_run(out))
    if results:
        losses = {key: [run["best_val_loss"] for run in runs] for key, runs in results.items()}
        perplexities = {key: [*map(perplexity, values)] for key, values in losses.items()}
        text = print_table(
            (args.method, *COLUMNS),
            [
                (
                    f"lr {lr:g}" + (f", r {r}" if r else ""),
                    str(len(losses[lr, r])),
                    *spread(losses[lr, r], 4),
                    *spread(perplexities[lr, r], 2),
                )
                for lr, r in results
            ],
        )
        with atomic_path(args.out / "sweep.md") as temporary:
            temporary.write_text(text + "\n")
        if can_draw():
            best = min(perplexities, key=lambda key: mean(perplexities[key]))
            draw(args.method, perplexities, best, args.out / "sweep.png")
    return int(failed)


if __name__ == "__main__":
    run_command(main)
