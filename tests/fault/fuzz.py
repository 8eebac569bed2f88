"""Damaged files by the thousand: `python -m tests.fault.fuzz [--short] [--seed N] [--case N]`.

Each is loaded correctly, or refused with one line that names it, within two seconds of processor
time and 1 GB of memory. Case N of a seed is always the same file.
"""

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from tests.fault.outcome import Outcome
from tests.fault.targets import MARKER, TARGETS, Target, prepare, problem_of

LONG, SHORT = 24_000, 1_000
SECONDS = 2.0  # of processor time
HANG = 30  # of the clock: the machine may be busy
MEMORY = 1 << 30


def campaign(short: bool, seed: int) -> list[Outcome]:
    return run(range(SHORT if short else LONG), seed)


def run(cases: range, seed: int) -> list[Outcome]:
    """The cases' outcomes, target by target; a process of its own reads, and may die of it."""
    outcomes = {t.name: Outcome(t.name, 0, [], 0.0) for t in TARGETS}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        prepare(directory)
        for case, problem, seconds in _results(directory, cases, seed):
            outcome = outcomes[target_of(case).name]
            outcome.tried += 1
            outcome.seconds += seconds
            if problem:
                outcome.failures.append(f"case {case} of seed {seed}: {problem}")
    return list(outcomes.values())


def target_of(case: int) -> Target:
    """The targets take turns; the drawn report is slow, and has one turn in sixteen."""
    *quick, slow = TARGETS
    return slow if case % 176 == 175 else quick[case % len(quick)]


def damage(directory: Path, case: int, seed: int) -> bytes:
    target = target_of(case)
    good = (directory / target.file).read_bytes()
    return target.mutate(Random(f"{seed}, {case}"), good, directory / MARKER)


def _results(directory: Path, cases: range, seed: int) -> Iterator[tuple[int, str | None, float]]:
    """Each case, what is wrong, and the seconds; a reader that dies or hangs is replaced."""
    while cases:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (theirs, directory, cases, seed)
        reader = multiprocessing.get_context("fork").Process(target=_read, args=arguments)
        reader.start()
        theirs.close()
        try:
            while cases:
                if not ours.poll(HANG):
                    raise TimeoutError
                yield (cases[0], *ours.recv())
                cases = cases[1:]
        except (EOFError, TimeoutError) as error:
            reader.kill()
            reader.join()
            shutil.rmtree(directory)  # the reader left its damaged file there
            directory.mkdir()
            prepare(directory)
            hung = isinstance(error, TimeoutError)
            yield cases[0], "hangs" if hung else f"dies with {reader.exitcode}", float(HANG * hung)
            cases = cases[1:]
        reader.join()


def _read(results: Connection, directory: Path, cases: range, seed: int) -> None:
    """Damage, read, report and mend, case after case."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    for case in cases:
        path = directory / target_of(case).file
        good, bad = path.read_bytes(), damage(directory, case, seed)
        path.write_bytes(bad)
        began = time.process_time()
        problem = problem_of(target_of(case), directory)
        seconds = time.process_time() - began
        path.write_bytes(good)
        if not problem and seconds > SECONDS:
            problem = f"takes {seconds:.1f} s"
        results.send((problem, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fault.fuzz", description=__doc__)
    parser.add_argument("--short", action="store_true", help=f"{SHORT} cases, not {LONG}")
    parser.add_argument("--count", type=int, help="so many cases")
    parser.add_argument("--case", type=int, help="this one case")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases = range(args.count or (SHORT if args.short else LONG))
    if args.case is not None:
        cases = range(args.case, args.case + 1)
    outcomes = run(cases, args.seed)
    for outcome in outcomes:
        print(f"{outcome.name:28}{outcome.tried:7,} tried, {len(outcome.failures)} failed, "
              f"{outcome.seconds:.1f} s", *outcome.failures, sep="\n  ")
    sys.exit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()
