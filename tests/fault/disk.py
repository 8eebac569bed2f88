"""A full or read-only disk gives one line, and the run continues once there is space."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC, EROFS
from pathlib import Path

from tests.fault.runs import Fork, Outcome, arguments, go_on, left, scratch, uninterrupted

STEPS = 20
SIZE = 16 << 20  # bytes


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    expected = uninterrupted("lora", STEPS).result
    with scratch() as folder:
        place = folder / "small"
        place.mkdir()
        if not mount(place, f"-t tmpfs -o size={SIZE}"):
            yield Outcome("not run: no mount allowed (inject has full disks)")
            return
        try:
            outcome = Outcome("a full and a read-only tmpfs")
            outcome.add("it fills up", fills_up(folder, place, expected))
            with filled(place):
                outcome.add("full from the start", refused(folder, place / "later", 1, ENOSPC))
            mount(place, "-o remount,ro")
            outcome.add("read-only", refused(folder, place / "last", 2, EROFS))
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)
    yield outcome


def mount(place: Path, options: str) -> bool:
    """Mount a small file system, if this user is allowed to."""
    command = f"mount {options} tmpfs '{place}'"
    return subprocess.run(command, shell=True, capture_output=True).returncode == 0


@contextmanager
def filled(place: Path) -> Iterator[None]:
    """Fill the disk until the end of the `with`."""
    filler = place / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


def fills_up(folder: Path, place: Path, expected: dict) -> list[str]:
    """Fill the disk in the middle of a run. The run continues once there is space again."""
    out = place / "run"
    argv = arguments("lora", folder, out, STEPS)
    process = Fork(argv, folder)
    process.wait_until(lambda: (out / "checkpoint.previous.safetensors").exists())
    with filled(place):
        failures = check_ending(process, out, 1, ENOSPC)
    return failures + go_on([*argv, "--resume"], folder, out, expected)


def refused(folder: Path, out: Path, wanted: int, error: int) -> list[str]:
    return check_ending(Fork(arguments("lora", folder, out, STEPS), folder), out, wanted, error)


def check_ending(process: Fork, out: Path, wanted: int, error: int) -> list[str]:
    status, lines = process.end()
    failures = left(out)
    if status != wanted or len(lines) != 1 or os.strerror(error) not in lines[0]:
        failures.append(f"exit status {status}, {lines}")
    return failures
