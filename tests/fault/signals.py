"""Signals at random moments of `make train-lora`: exit code, messages, resume."""

import random
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fault import runs

STEPS = 30
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOMENTS = ("in start-up", "twice", "in the steps", "in the steps")
NOTICE = "stopping once the step is done and saved; Ctrl-C stops at once"
AT_ONCE = "error: interrupted"


def campaign(short: bool, seed: int) -> Iterator[runs.Outcome]:
    outcome = runs.Outcome("SIGINT, SIGTERM and SIGHUP")
    draw = random.Random(seed)
    whole = runs.uninterrupted("lora", STEPS)
    count = 3 if short else 30
    with runs.scratch() as folder:
        for i in range(count):
            number = NUMBERS[i % 3]
            moment = MOMENTS[i % 4]
            problems = one_signal(folder, folder / f"run{i}", number, whole, draw, moment)
            outcome.add(f"run {i}, {number.name} {moment}", problems)
    yield outcome


def one_signal(
    folder: Path, out: Path, number: int, whole: runs.Whole, draw: random.Random, moment: str
) -> list[str]:
    argv = runs.arguments("lora", folder, out, STEPS)
    process = runs.Process(make_command(argv), folder)
    if moment == "in start-up":
        process.wait_until(lambda: catches_sigterm(process))
        time.sleep(draw.uniform(0, whole.startup))
    else:
        process.wait_until(process.has_begun)
        time.sleep(draw.uniform(0, 0.95 * whole.steps))
    process.send_signal(number)
    if moment == "twice":
        time.sleep(draw.uniform(0, 0.03))
        process.send_signal(number)
    status, lines = process.end()
    failures = check_ending(status, 128 + number, lines, out)
    if (out / "run.json").exists():
        return failures + runs.differences(out, whole.result)
    return failures + runs.go_on(runs.with_resume(argv, out), folder, out, whole.result)


def make_command(argv: list[str]) -> list[str]:
    """Return the command of `make train-lora`, with small ARGS."""
    said = subprocess.run(
        ["make", "--no-print-directory", "-n", "train-lora", f"ARGS={shlex.join(argv[1:])}"],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(said.stdout.splitlines()[-1])


def catches_sigterm(process: runs.Process) -> bool:
    """Return whether train.py's first line has run. Before that, Python is still starting."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def check_ending(status: int, wanted: int, lines: list[str], out: Path) -> list[str]:
    """Return the problems of a run's ending after the signal."""
    # The signal came after the last step, or while Python ended without its handlers.
    if status in (0, 128 - wanted) and lines in ([], [NOTICE]):
        if (out / "run.json").exists():
            return []
        return [f"ended with {status} and no result"]

    saved = len(lines) == 2 and lines[0] == NOTICE and lines[1].startswith("stopped after step ")
    stopped = saved or lines in ([AT_ONCE], [NOTICE, AT_ONCE])
    if status == wanted and stopped:
        return []
    return [f"exit status {status}, {lines}"]
