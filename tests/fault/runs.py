"""Small runs of `train.py` in other processes, and what they leave."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shlex import split
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

import train
from common.errors import run_command
from data.tokenizer import FAST, SETTINGS
from model.gpt2 import GPT2, GPT2Config
from storage.hub import MINI
from storage.weights import save_gpt2
from training import report
from training.directory import MODEL_FILES

ROOT = Path(__file__).resolve().parents[2]
BOOK = (ROOT / "data" / "book.txt").read_text(encoding="utf-8")
TIMED = {"seconds", "tokens_per_second", "peak_memory_mb", "options"}
BEGUN = ("base: val", "resuming after")  # printed by a run just before its steps
PATIENCE = 300  # seconds: no run here takes so long


@dataclass
class Outcome:
    """The trials of a part of the campaign, and their problems."""

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
    """Yield a folder, in memory if possible, because fsync on a busy disk takes seconds."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder).resolve()


class Watched:
    """A process that prints into the files `out_file` and `err_file` of a folder."""

    def __init__(self, folder: Path):
        self.out_file = folder / "stdout"
        self.err_file = folder / "stderr"
        self.out_file.write_text("")

    def has_begun(self) -> bool:
        return any(mark in self.out_file.read_text() for mark in BEGUN)

    def wait_until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait until the condition is true, the process ends, or the time is up."""
        end = time.perf_counter() + seconds
        while self.poll() is None and time.perf_counter() < end and not condition():
            time.sleep(0.0005)

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end. Return the exit status and the lines on stderr."""
        return self.wait(PATIENCE), self.err_file.read_text().splitlines()


class Process(Watched, subprocess.Popen):
    """A command that runs in the project's directory."""

    def __init__(self, command: list[str], folder: Path):
        Watched.__init__(self, folder)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with open(self.out_file, "w") as out, open(self.err_file, "w") as err:
            subprocess.Popen.__init__(
                self,
                command,
                cwd=ROOT,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,  # isolates it from Ctrl-C here
            )


class Fork(Watched):
    """`train.py` in a fork of this process, which has already imported the slow modules."""

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        prepare: Callable[[], object] = lambda: None,
        draw: bool = False,  # a picture takes as long as several steps
    ):
        super().__init__(folder)
        context = multiprocessing.get_context("fork")
        self.child = context.Process(target=self._train, args=(argv, prepare, draw))
        self.child.start()

    def _train(self, argv: Sequence[str], prepare: Callable[[], object], draw: bool) -> None:
        torch.set_num_threads(1)  # a larger pool does not survive the fork
        for number, file in ((1, self.out_file), (2, self.err_file)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        if not draw:
            report.can_draw = lambda: False
        prepare()
        run_command(train.main, argv)

    def poll(self) -> int | None:
        return self.child.exitcode

    def kill(self) -> None:
        self.child.kill()

    def wait(self, seconds: float) -> int:
        self.child.join(seconds)
        assert self.child.exitcode is not None, "the process hangs"
        return self.child.exitcode


def small_base(folder: Path) -> Path:
    """Return the directory of a random GPT-2 with the tokenizer of `mini`."""
    directory = folder / "base"
    if not directory.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_gpt2(
                GPT2(GPT2Config(8192, n_positions=32, n_embd=64, n_layer=1, n_head=2)), directory
            )
        for name in (FAST, SETTINGS):
            shutil.copy(MINI / name, directory)
    return directory


def arguments(method: str, folder: Path, out: Path, steps: int, *more: object) -> list[str]:
    """Return arguments of a small run on the book's beginning, with a checkpoint per step."""
    book = folder / "book.txt"
    if not book.exists():
        book.write_text(BOOK[:12_000])
    small = "--block-size 32 --stride 32 --batch-size 4 --val-fraction 0.05 "
    often = "--eval-every 4 --log-every 1 --checkpoint-every 1 --device cpu --max-steps"
    files = ("--base", small_base(folder), "--book", book, "--out", out)
    words = [method, *split(small + often), steps, *files, *more]
    return [str(word) for word in words]


def with_resume(argv: list[str], out: Path) -> list[str]:
    """Return the arguments that resume the run, if there is a run to resume."""
    return [*argv, "--resume"] if (out / "metrics.jsonl").exists() else argv


def result(out: Path) -> dict:
    """Return everything in a finished run that must not depend on interruptions."""
    report = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for values in (report, *lines):
        for name in TIMED & values.keys():
            del values[name]
    model = [path for name in MODEL_FILES for path in out.glob(name)]
    return {"report": report, "metrics": lines, **{file.name: file.read_bytes() for file in model}}


class Whole(NamedTuple):
    """The result of an uninterrupted run, and the seconds of its start-up and of its steps."""

    result: dict
    startup: float
    steps: float


@cache
def uninterrupted(method: str, *more: object) -> Whole:
    """Run `train.py` to the end, with `more` added to `arguments`."""
    with scratch() as folder:
        argv = arguments(method, folder, folder / "whole", *more)
        began = time.perf_counter()
        process = Fork(argv, folder)
        process.wait_until(process.has_begun)
        startup = time.perf_counter() - began
        status, lines = process.end()
        assert status == 0, lines
        return Whole(result(folder / "whole"), startup, time.perf_counter() - began - startup)


def go_on(argv: list[str], folder: Path, out: Path, expected: dict) -> list[str]:
    """Run to the end. Return the failure, or how `out` differs from the expected result."""
    status, lines = Fork(argv, folder).end()
    if status:
        return [f"going on ends with {status}: {lines[-3:]}"]
    return differences(out, expected)


def differences(out: Path, expected: dict) -> list[str]:
    """Return the differences from the expected result, and the files that were left behind."""
    try:
        found = result(out)
    except (OSError, ValueError) as error:
        return [f"no whole result: {error}"]
    names = sorted(found.keys() | expected.keys())
    return [f"{n} differs" for n in names if found.get(n) != expected.get(n)] + left(out)


def left(out: Path) -> list[str]:
    """Return unfinished files that should be absent."""
    return [f"left behind {path.name}" for path in out.glob(".*")]
