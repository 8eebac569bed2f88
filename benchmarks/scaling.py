"""What more ranks bring: seconds and bytes of a data parallel step, by the number of ranks.

`python -m benchmarks.scaling` starts real ranks with torchrun, all on this machine, round after
round, so that a machine that slows down slows every number of ranks. They share one batch of 16
windows of 128 and the machine's cores. Bytes are those that a step of one rank hands to all_reduce;
a ring sends and receives 2 (N - 1) / N of them. The all-reduce is also timed alone, on messages of
the same sizes. The base is a GPT-2 124M of random weights, made on the spot.
"""

import os
import signal
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.scaling_worker import METHODS
from benchmarks.speed import facts, run_apart
from benchmarks.speed_report import spread, text
from benchmarks.speed_worker import Task
from cli import Parser, number, print_table
from errors import run_command
from files import write_json
from hardware import PRECISIONS, pick_device
from model.checkpoint import load_config
from model.hub import find_base

COLUMNS = ("", "ranks", "threads a rank", "seconds a step", "times faster", "bytes a step",
           "of them sent by a ring", "all-reduce alone, ms")


def main() -> None:
    opts = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: one line
    with TemporaryDirectory() as folder:
        if opts.base is None:
            run_apart(Task("base", folder))
        directory = find_base(opts.base or folder)[1]
        block = min(Task.block_size, load_config(directory).n_positions)
        task = Task("train", str(directory), opts.device, precision=opts.precision,
                    block_size=block, warm_up=opts.warm_up, steps=opts.steps)
        results = facts(opts) | {"how": " ".join(__doc__.split()), "precision": opts.precision}
        path = opts.out / f"scaling-{results['machine']}.json"
        for i in range(opts.rounds):
            for ranks in opts.ranks[:: -1 if i % 2 else 1]:
                measured = run_apart(task, *launcher(ranks))
                for method, figures in measured.items():
                    del figures["base"]
                    results["measurements"].append({"round": i, **figures})
                    print(f"round {i + 1}: {method}, {ranks} ranks: {figures['median']:.4g} s",
                          flush=True)
            results["summary"] = summarise(results["measurements"])
            write_json(path, results)
    report(results["summary"])
    print(f"\nsaved in {path}")


def parse_args() -> Namespace:
    parser = Parser(prog="benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=None, metavar="B",
                        help="as train.py's (default: GPT-2 124M with random weights)")
    parser.add_argument("--ranks", nargs="+", type=number(int, 1, Task.batch_size),
                        default=[1, 2, 4], metavar="N")
    parser.add_argument("--rounds", type=number(int, 1), default=3)
    parser.add_argument("--steps", type=number(int, 1, 50), default=3,  # an epoch is 74
                        help="timed after the warm-up")
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results",
                        metavar="DIR", help="where the figures go")
    opts = parser.parse_args()
    opts.device, opts.warm_up, opts.load_average = pick_device(opts.device).type, 2, os.getloadavg()
    return opts


def launcher(ranks: int) -> list[str]:
    """What `python -m` starts, but for the task; each rank has its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
            "benchmarks.scaling_worker", str(threads)]


def summarise(measurements: list[dict]) -> list[dict]:
    """Over the rounds, for each method and number of ranks; `faster` is against the fewest."""
    rows = []
    for method in METHODS:
        of_method = [r for r in measurements if r["method"] == method]
        counts = sorted({r["ranks"] for r in of_method})
        by_round = {(r["round"], r["ranks"]): r for r in of_method}
        for count in counts:
            runs = [r for r in of_method if r["ranks"] == count]
            exchange = [r["all_reduce_seconds"] for r in runs if "all_reduce_seconds" in r]
            rows.append({
                "method": method, "ranks": count, "threads": runs[0]["threads"],
                "seconds": spread([r["median"] for r in runs]),
                "faster": spread([by_round[r["round"], counts[0]]["median"] / r["median"]
                                  for r in runs]),
                "bytes": runs[0]["bytes"],
                "ring_bytes": round(2 * (count - 1) / count * runs[0]["bytes"]),
                "all_reduce_seconds": spread(exchange) if exchange else None})
    return rows


def report(summary: list[dict]) -> None:
    def milliseconds(seconds: dict | None) -> str:
        return text({k: 1000 * v for k, v in seconds.items()}, "{:.1f}") if seconds else "-"

    print()
    print_table(COLUMNS, [
        ({"lora": "LoRA", "full": "full"}[row["method"]], str(row["ranks"]), str(row["threads"]),
         text(row["seconds"]), text(row["faster"]), f"{row['bytes']:,}", f"{row['ring_bytes']:,}",
         milliseconds(row["all_reduce_seconds"])) for row in summary])


if __name__ == "__main__":
    run_command(main)
