"""Small runs of `train.py` in processes of their own, and what they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from training.directory import MODEL_FILES

ROOT = Path(__file__).resolve().parents[2]
BOOK = (ROOT / "data" / "book.txt").read_text(encoding="utf-8")
TIMED = {"seconds", "tokens_per_second", "peak_memory_mb", "options"}
BEGUN = ("base: val", "resuming after")  # what a run prints just before its steps
PATIENCE = 300  # seconds that no run here takes


@dataclass
class Outcome:
    """Hold what a part of the campaign tried, and what went wrong."""

    name: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, what: str, problems: list[str]) -> None:
        """Count one trial and its problems."""
        self.tried += 1
        self.failures += [f"{what}: {problem}" for problem in problems]


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder, in memory where the system has that: a busy disk's fsync takes seconds."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder).resolve()


class Process(subprocess.Popen):
    """A command at work in the project's directory; what it prints goes into `folder`."""

    def __init__(self, command: list[str], folder: Path):
        self.out_file = folder / "stdout"
        self.err_file = folder / "stderr"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with open(self.out_file, "w") as out, open(self.err_file, "w") as err:
            super().__init__(
                command, cwd=ROOT, stdout=out, stderr=err, env=environment, start_new_session=True
            )  # Ctrl-C here does not reach it

    def has_begun(self) -> bool:
        return any(mark in self.out_file.read_text() for mark in BEGUN)

    def wait_until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait until the condition holds, the process ends, or the time is over."""
        end = time.perf_counter() + seconds
        while self.poll() is None and time.perf_counter() < end and not condition():
            time.sleep(0.0005)

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end; return the exit status and the lines on stderr."""
        return self.wait(PATIENCE), self.err_file.read_text().splitlines()


def options(folder: Path, out: Path, steps: int, *more: object) -> list[str]:
    """Ask for a run on `mini` and the beginning of the book, with a checkpoint at each step."""
    book = folder / "book.txt"
    if not book.exists():
        book.write_text(BOOK[:12_000])
    return list(
        map(
            str,
            (
                "--base",
                "mini",
                "--book",
                book,
                "--out",
                out,
                "--block-size",
                32,
                "--stride",
                32,
                "--batch-size",
                4,
                "--max-steps",
                steps,
                "--eval-every",
                4,
                "--log-every",
                1,
                "--checkpoint-every",
                1,
                "--val-fraction",
                0.05,
                "--device",
                "cpu",
                *more,
            ),
        )
    )


def train_command(method: str, *arguments: object) -> list[str]:
    """Return the command of such a run; the arguments are those of `options`."""
    return [sys.executable, "train.py", method, *options(*arguments)]


def resume_command(command: list[str], out: Path) -> list[str]:
    """Return the command that goes on, where there is anything to go on with."""
    if (out / "metrics.jsonl").exists():
        return [*command, "--resume"]
    return command


def result(out: Path) -> dict:
    """Return all of a finished run that must not depend on how often it was stopped."""
    report = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for values in (report, *lines):
        for name in TIMED & values.keys():
            del values[name]
    model = [path for name in MODEL_FILES for path in out.glob(name)]
    return {"report": report, "metrics": lines, **{file.name: file.read_bytes() for file in model}}


class Whole(NamedTuple):
    """Hold the result of an uninterrupted run, and the seconds of its start-up and of its steps."""

    result: dict
    startup: float
    steps: float


@cache
def uninterrupted(method: str, *arguments: object) -> Whole:
    """Run `train_command` in a folder of its own; it must succeed."""
    began = time.perf_counter()
    with scratch() as folder:
        process = Process(train_command(method, folder, folder / "whole", *arguments), folder)
        process.wait_until(process.has_begun)
        startup = time.perf_counter() - began
        status, lines = process.end()
        assert status == 0, lines
        return Whole(result(folder / "whole"), startup, time.perf_counter() - began - startup)


def go_on(command: list[str], folder: Path, out: Path, expected: dict) -> list[str]:
    """Run the command that goes on; return how it failed, or what in `out` is not as expected."""
    status, lines = Process(command, folder).end()
    if status:
        return [f"going on ends with {status}: {lines[-3:]}"]
    return differences(out, expected)


def differences(out: Path, expected: dict) -> list[str]:
    """Return what of a finished run is not as expected, and what it left behind."""
    try:
        found = result(out)
    except (OSError, ValueError) as error:
        return [f"no whole result: {error}"]
    names = sorted(found.keys() | expected.keys())
    return [f"{n} differs" for n in names if found.get(n) != expected.get(n)] + left(out)


def left(out: Path) -> list[str]:
    """Return the unfinished files that should not be there."""
    return [f"left behind {path.name}" for path in out.glob(".*")]
