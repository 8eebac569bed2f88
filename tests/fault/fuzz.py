"""Thousands of damaged files: each loads correctly, or is refused with a line that names it.

A reader may take four seconds of processor time and 1 GiB. `run(range(N, N + 1), seed)` repeats
case N.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from tests.fault.runs import Outcome, scratch
from tests.fault.targets import TARGETS, Target, prepare, problem_of

LONG = 24_000  # number of cases
SHORT = 400
SECONDS = 4.0  # of processor time
HANG = 30  # seconds of wall-clock time, because the machine may be busy
MEMORY = 1 << 30


def campaign(short: bool, seed: int) -> list[Outcome]:
    count = SHORT if short else LONG
    return run(range(count), seed)


def run(cases: range, seed: int) -> list[Outcome]:
    """Return the outcomes by target. A separate process reads the files, and may die."""
    outcomes = {target.name: Outcome(target.name) for target in TARGETS}
    with scratch() as directory:
        prepare(directory)
        for case, problem, seconds in _results(directory, cases, seed):
            outcome = outcomes[target_of(case).name]
            outcome.seconds += seconds
            problems = [problem] if problem else []
            outcome.add(f"case {case} of seed {seed}", problems)
    return list(outcomes.values())


def target_of(case: int) -> Target:
    """Let the targets take turns."""
    return TARGETS[case % len(TARGETS)]


def _results(directory: Path, cases: range, seed: int) -> Iterator[tuple[int, str | None, float]]:
    """Yield each case, its problem and the seconds. A dead or hanging reader is replaced."""
    good = {target.file: (directory / target.file).read_bytes() for target in TARGETS}
    while cases:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (theirs, directory, good, cases, seed)
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
            file = target_of(cases[0]).file
            (directory / file).write_bytes(good[file])
            if isinstance(error, TimeoutError):
                yield cases[0], "hangs", float(HANG)
            else:
                yield cases[0], f"dies with {reader.exitcode}", 0.0
            cases = cases[1:]
        reader.join()


def _read(results: Connection, directory: Path, good: dict, cases: range, seed: int) -> None:
    """Damage, read, report and restore the files, case after case."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    for case in cases:
        target = target_of(case)
        path = directory / target.file
        path.write_bytes(target.mutate(Random(f"{seed}, {case}"), good[target.file]))
        began = time.process_time()
        problem = problem_of(target, directory)
        seconds = time.process_time() - began
        path.write_bytes(good[target.file])
        if not problem and seconds > SECONDS:
            problem = f"takes {seconds:.1f} s"
        results.send((problem, seconds))
