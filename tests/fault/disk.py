"""A disk that is full, and one that is read-only: one line, and after space is made it goes on."""

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fault.outcome import Outcome
from tests.fault.process import (
    Process,
    describe,
    differences,
    options,
    scratch,
    start,
    train_command,
    uninterrupted,
)

STEPS, SIZE = 20, 16 << 20


def campaign(short: bool, seed: int) -> list[Outcome]:
    began = time.perf_counter()
    expected, _ = uninterrupted(STEPS)
    with scratch() as folder:
        place = folder / "small"
        place.mkdir()
        if mounted := mount(place):
            try:
                failures = [*full(folder, place / "run", expected, filled(place)),
                            *no_space(folder, place), *read_only(folder, place)]
            finally:
                subprocess.run(["umount", "--lazy", place], check=True)
        else:
            failures = full(folder, place / "run", expected, size_limit)
    name = "a full and a read-only tmpfs" if mounted else "a file-size limit (no mount allowed)"
    return [Outcome(name, 3 if mounted else 1, failures, time.perf_counter() - began)]


def mount(place: Path) -> bool:
    """A small file system of its own, if this user may have one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def filled(place: Path) -> Callable:
    @contextmanager
    def fill(process: Process) -> Iterator[None]:
        """All of the disk is taken until the end of the `with`."""
        filler = place / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        try:
            yield
        finally:
            filler.unlink()

    return fill


@contextmanager
def size_limit(process: Process) -> Iterator[None]:
    """No file of the process may grow beyond 100 kB, and its checkpoints are larger."""
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    yield


def full(folder: Path, out: Path, expected: dict, fill: Callable) -> list[str]:
    """It fills up in the middle of a run, which goes on when there is space again."""
    command = train_command("lora", *options(folder, out, STEPS))
    process = start(command, folder)
    process.wait_until(lambda: (out / "checkpoint.previous.pt").exists())
    with fill(process):
        status, lines = process.wait(), process.error_lines()
        failures = []
        if status != 1 or len(lines) != 1 or "cannot be written" not in lines[0]:
            failures.append(f"a full disk: exit status {status}, {lines}")
        if left := [path.name for path in out.glob(".*")]:
            failures.append(f"a full disk: left behind {left}")
    again = [*command, "--resume"]
    process = start(again, folder)
    if process.wait():
        return [*failures, describe(again, process)]
    return failures + differences(out, "lora", expected)


def no_space(folder: Path, place: Path) -> list[str]:
    """A disk that is too small is refused before the first step."""
    with filled(place)(None):
        return refused(folder, place / "later", "are free")


def read_only(folder: Path, place: Path) -> list[str]:
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    return refused(folder, place / "later", os.strerror(30))  # EROFS


def refused(folder: Path, out: Path, words: str) -> list[str]:
    process = start(train_command("lora", *options(folder, out, STEPS)), folder)
    status, lines = process.wait(), process.error_lines()
    if status != 2 or len(lines) != 1 or words not in lines[0]:
        return [f"{words}: exit status {status}, {lines}"]
    return ["something was written"] * out.exists()
