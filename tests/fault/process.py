"""Small runs of `train.py` in processes of their own, to be killed, and what they leave."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"lora": ("adapter_config.json", "adapter_model.safetensors"),
           "full": ("config.json", "model.safetensors")}
TIMED = {"seconds", "tokens_per_second", "peak_memory_mb", "options"}
BEGUN = ("base: val", "resuming after")  # what a run prints just before its steps
PATIENCE = 300  # seconds that no run here takes


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where the system has that: a busy disk's fsync takes seconds."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@dataclass
class Process:
    """A command that writes what it prints into `log` and `errors`."""

    popen: subprocess.Popen
    log: Path
    errors: Path

    def has_begun(self) -> bool:
        text = self.log.read_text()
        return any(mark in text for mark in BEGUN)

    def wait_until(self, condition, seconds: float = PATIENCE) -> None:
        """Until the condition holds, the process ends, or the time is over."""
        end = time.perf_counter() + seconds
        while self.popen.poll() is None and time.perf_counter() < end and not condition():
            time.sleep(0.0005)

    def wait(self) -> int:
        return self.popen.wait(PATIENCE)

    def error_lines(self) -> list[str]:
        return self.errors.read_text().splitlines()


def start(command: list[str], folder: Path, **settings) -> Process:
    """Start it from the project's directory; Ctrl-C there does not reach it."""
    log, errors = folder / "stdout", folder / "stderr"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out, open(errors, "w") as err:
        popen = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=environment,
                                 start_new_session=True, **settings)
    return Process(popen, log, errors)


def options(folder: Path, out: Path, steps: int, *more: object) -> list[str]:
    """A run on `mini` and the beginning of the bundled book, a checkpoint at each step."""
    book = folder / "book.txt"
    if not book.exists():
        book.write_text((ROOT / "data" / "book.txt").read_text()[:12_000])
    return list(map(str, (
        "--base", "mini", "--book", book, "--out", out, "--block-size", 32, "--stride", 32,
        "--batch-size", 4, "--max-steps", steps, "--eval-every", 4, "--log-every", 1,
        "--checkpoint-every", 1, "--val-fraction", 0.05, "--device", "cpu", *more)))


def train_command(method: str, *arguments: str) -> list[str]:
    return [sys.executable, "train.py", method, *arguments]


def resume_command(command: list[str], out: Path) -> list[str]:
    """The command that goes on, where there is anything to go on with."""
    return [*command, "--resume"] if (out / "metrics.jsonl").exists() else command


def result(out: Path, method: str) -> dict:
    """All of a finished run that must not depend on how often it was stopped."""
    report = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = {name: (out / name).read_bytes() for name in WEIGHTS[method]}
    return {"report": untimed(report), "metrics": list(map(untimed, lines)), **files}


def untimed(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in TIMED}


@cache
def uninterrupted(steps: int) -> tuple[dict, float]:
    """The result of a LoRA run that nothing happens to, and its seconds."""
    began = time.perf_counter()
    with scratch() as folder:
        command = train_command("lora", *options(folder, folder / "whole", steps))
        process = start(command, folder)
        if process.wait():
            raise RuntimeError(describe(command, process))
        return result(folder / "whole", "lora"), time.perf_counter() - began


def differences(out: Path, method: str, expected: dict) -> list[str]:
    """What of a finished run is not as expected."""
    try:
        found = result(out, method)
    except (OSError, ValueError) as error:
        return [f"no whole result: {error}"]
    return [f"{name} differs" for name in expected if found[name] != expected[name]]


def describe(command: list[str], process: Process) -> str:
    return (f"`{shlex.join(command)}` ended with {process.popen.returncode}: "
            f"{' / '.join(process.error_lines()[-3:])}")
