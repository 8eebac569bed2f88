"""Two runs start in one directory at the same moment: exactly one trains."""

from collections.abc import Iterator
from pathlib import Path

from tests.fault.runs import Fork, Outcome, arguments, differences, scratch, uninterrupted

STEPS = 20
KNOWN = ("another run is using it", "contains a run")  # the allowed reasons of the refused run


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    outcome = Outcome("two racing runs")
    expected = uninterrupted("lora", STEPS).result
    count = 2 if short else 20
    with scratch() as folder:
        for i in range(count):
            outcome.add(f"race {i}", race(folder, folder / str(i), expected))
    yield outcome


def race(folder: Path, out: Path, expected: dict) -> list[str]:
    argv = arguments("lora", folder, out, STEPS)
    both = []
    for name in ("a", "b"):
        place = folder / name
        place.mkdir(exist_ok=True)
        both.append(Fork(argv, place))

    (first, _), (second, lines) = sorted(process.end() for process in both)
    refused = len(lines) == 1 and any(known in lines[0] for known in KNOWN)
    if (first, second) != (0, 2) or not refused:
        return [f"the two end with {first} and {second}, {lines}"]
    return differences(out, expected)
