"""Two runs into one directory at the same moment: exactly one trains."""

from collections.abc import Iterator
from pathlib import Path

from tests.fault.runs import Outcome, Process, differences, scratch, train_command, uninterrupted

STEPS = 20
KNOWN = ("another run is using it", "holds a run")  # what the refused one may say


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    outcome, expected = Outcome("two racing runs"), uninterrupted("lora", STEPS).result
    with scratch() as folder:
        for i in range(1 if short else 10):
            outcome.add(f"race {i}", race(folder, folder / str(i), expected))
    yield outcome


def race(folder: Path, out: Path, expected: dict) -> list[str]:
    command, places = train_command("lora", folder, out, STEPS), [folder / "a", folder / "b"]
    for place in places:
        place.mkdir(exist_ok=True)
    both = [Process(command, place) for place in places]
    ends = sorted(process.end() for process in both)
    (first, _), (second, lines) = ends
    if (first, second) != (0, 2) or len(lines) != 1 or not any(k in lines[0] for k in KNOWN):
        return [f"the two end with {ends}"]
    return differences(out, expected)
