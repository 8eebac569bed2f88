"""SIGINT and SIGTERM at random moments of what `make train-lora` runs: exit code, words, resume."""

import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

from tests.fault.outcome import Outcome
from tests.fault.process import (
    ROOT,
    Process,
    describe,
    differences,
    options,
    resume_command,
    scratch,
    start,
    uninterrupted,
)

STEPS = 20
NOTICE = "stopping once the step is done and saved; a second signal stops at once"
AT_ONCE = "error: interrupted"


def campaign(short: bool, seed: int) -> list[Outcome]:
    began, failures, tries = time.perf_counter(), [], 2 if short else 20
    draw = random.Random(seed)
    expected, seconds = uninterrupted(STEPS)
    with scratch() as folder:
        for i in range(tries):
            number = (signal.SIGINT, signal.SIGTERM)[i % 2]
            failures += one_signal(folder, folder / f"run{i}", number, seconds, draw, expected,
                                   twice=i % 4 == 3)
    return [Outcome("SIGINT and SIGTERM", tries, failures, time.perf_counter() - began)]


def make_command(folder: Path, out: Path) -> list[str]:
    """What `make train-lora` would run with small ARGS."""
    arguments = shlex.join(options(folder, out, STEPS))
    told = subprocess.run(["make", "--no-print-directory", "-n", "train-lora", f"ARGS={arguments}"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    return shlex.split(told.stdout.splitlines()[-1])


def one_signal(folder: Path, out: Path, number: int, seconds: float, draw: random.Random,
               expected: dict, twice: bool) -> list[str]:
    command = make_command(folder, out)
    process = start(command, folder)
    process.wait_until(lambda: catches_sigterm(process))
    time.sleep(draw.uniform(0, 0.95 * seconds))
    process.popen.send_signal(number)
    if twice:
        time.sleep(draw.uniform(0, 0.05))
        process.popen.send_signal(number)
    status, lines = process.wait(), process.error_lines()
    failures = check_ending(status, 128 + number, lines, out)
    if not (out / "run.json").exists():
        failures += go_on(folder, out, process, command)
    failures += differences(out, "lora", expected)
    return [f"{out.name}, {signal.Signals(number).name}: {failure}" for failure in failures]


def catches_sigterm(process: Process) -> bool:
    """From train.py's first line on; before that, Python itself is starting."""
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def check_ending(status: int, wanted: int, lines: list[str], out: Path) -> list[str]:
    # It came after the last step, or when Python, its handlers gone, was ending.
    if status in (0, 128 - wanted) and lines in ([], [NOTICE]):
        return [] if (out / "run.json").exists() else ["ended with 0 and no result"]
    saved = len(lines) == 2 and lines[0] == NOTICE and lines[1].startswith("stopped after step ")
    stopped = saved or lines in ([AT_ONCE], [NOTICE, AT_ONCE])
    return [] if status == wanted and stopped else [f"exit status {status}, {lines}"]


def go_on(folder: Path, out: Path, process: Process, command: list[str]) -> list[str]:
    """By the command that the stopped run printed, if it did."""
    told = " ".join(process.error_lines()).partition("; go on with: ")[2]
    again = shlex.split(told) if told else resume_command(command, out)
    process = start(again, folder)
    return [describe(again, process)] if process.wait() else []
