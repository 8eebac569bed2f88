"""Two runs into one directory at the same moment: exactly one trains."""

import time
from pathlib import Path

from tests.fault.outcome import Outcome
from tests.fault.process import differences, options, scratch, start, train_command, uninterrupted

STEPS = 20


def campaign(short: bool, seed: int) -> list[Outcome]:
    began, failures, tries = time.perf_counter(), [], 1 if short else 10
    expected, _ = uninterrupted(STEPS)
    with scratch() as folder:
        for i in range(tries):
            failures += race(folder / f"race{i}", folder, expected)
    return [Outcome("two racing runs", tries, failures, time.perf_counter() - began)]


def race(out: Path, folder: Path, expected: dict) -> list[str]:
    command = train_command("lora", *options(folder, out, STEPS))
    places = [folder / f"{out.name}-{side}" for side in "ab"]
    for place in places:
        place.mkdir()
    processes = [start(command, place) for place in places]
    statuses = sorted(process.wait() for process in processes)
    if statuses != [0, 2]:
        return [f"{out.name}: exit statuses {statuses}"]
    loser = next(process for process in processes if process.popen.returncode == 2)
    lines = loser.error_lines()
    known = ("another run is at work there", "holds a run")
    if len(lines) != 1 or not any(words in lines[0] for words in known):
        return [f"{out.name}: the refused run says {lines}"]
    return differences(out, "lora", expected)
