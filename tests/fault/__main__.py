"""Run the fault campaign: `python -m tests.fault [--short] [--seed N] [PART ...]`, or `make fault`.

Prints a Markdown table of the trials. Exits with 1 if anything failed.
"""

import importlib
import signal
import time
from collections.abc import Sequence

from common.cli import Parser, number, print_table
from common.errors import UserError, run_command
from tests.fault.runs import Outcome

PARTS = ("kill", "inject", "signals", "disk", "race", "fuzz", "files")


def main(argv: Sequence[str] | None = None) -> int:
    # Runs under `nohup` or in a shell's background job would ignore these signals.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = Parser(prog="tests.fault", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="the form that CI runs")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown:
        raise UserError(f"PART {unknown[0]}: is none of {', '.join(PARTS)}")

    outcomes: list[tuple[str, Outcome]] = []
    for part in args.parts or PARTS:
        began = time.perf_counter()
        module = importlib.import_module(f"tests.fault.{part}")
        for outcome in module.campaign(args.short, args.seed):
            outcome.seconds = outcome.seconds or time.perf_counter() - began
            outcomes.append((part, outcome))
            began = time.perf_counter()

    rows = []
    failures = []
    for part, outcome in outcomes:
        tried = f"{outcome.tried:,}"
        failed = str(len(outcome.failures))
        rows.append((f"{part}: {outcome.name}", tried, failed, f"{outcome.seconds:.0f}"))
        failures += [f"{part}: {failure}" for failure in outcome.failures]
    print_table(("part", "tried", "failures", "seconds"), rows)
    for failure in failures:
        print(f"FAILED {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    run_command(main)
