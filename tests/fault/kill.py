"""SIGKILL at random moments, with a resume each time, gives an undisturbed run's result."""

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fault import runs

PAIRS = (("lora", "fp32"), ("full", "fp32"), ("lora", "bf16"), ("full", "bf16"))
SHORT_PAIRS = 2  # some processors lack bf16 instructions
STEPS = {"lora": 20, "full": 8}
KILLED = -signal.SIGKILL
UNFINISHED = ".checkpoint.safetensors.*"
MOMENTS = (
    "in the steps",
    "while a checkpoint is written",
    "right after resuming",
    "during start-up",
)


def campaign(short: bool, seed: int) -> Iterator[runs.Outcome]:
    pairs = PAIRS[:SHORT_PAIRS] if short else PAIRS
    for i, (method, precision) in enumerate(pairs):
        kills = len(MOMENTS) * (1 if short else 12)
        yield kill_often(method, precision, kills, random.Random(seed + i))


def kill_often(method: str, precision: str, count: int, draw: random.Random) -> runs.Outcome:
    """Kill `count` times. If a run reaches its end first, begin another."""
    outcome = runs.Outcome(f"SIGKILL, {method}, {precision}")
    options = (STEPS[method], "--precision", precision)
    whole = runs.uninterrupted(method, *options)
    run = 0
    in_writing = 0
    with runs.scratch() as folder:
        while outcome.tried < count and not outcome.failures:
            out = folder / f"run{run}"
            run += 1
            argv = runs.arguments(method, folder, out, *options)
            status = KILLED
            while status == KILLED and outcome.tried < count:
                moment = MOMENTS[outcome.tried % len(MOMENTS)]
                status, lines = kill(argv, folder, out, moment, whole, draw)
                if status == KILLED:
                    outcome.tried += 1
                    in_writing += any(out.glob(UNFINISHED))

            problems = []
            if status not in (0, KILLED):
                problems.append(f"exit status {status}: {lines[-3:]}")
            problems += runs.go_on(runs.with_resume(argv, out), folder, out, whole.result)
            outcome.failures += [f"after {outcome.tried} kills: {what}" for what in problems]
    outcome.name += f" ({in_writing} in the writing of a checkpoint)"
    return outcome


def kill(
    argv: list[str], folder: Path, out: Path, moment: str, whole: runs.Whole, draw: random.Random
) -> tuple[int, list[str]]:
    """Start or resume the run, and kill it. Return its status (0 if it ended) and its stderr."""
    process = runs.Fork(runs.with_resume(argv, out), folder)
    if moment == "during start-up":
        time.sleep(draw.uniform(0, whole.startup))
    else:
        process.wait_until(process.has_begun)
        share = {"in the steps": 0.5, "while a checkpoint is written": 0.3}.get(moment, 0.01)
        time.sleep(draw.uniform(0, share * whole.steps))
    if moment == "while a checkpoint is written":
        process.wait_until(lambda: any(out.glob(UNFINISHED)), 0.3 * whole.steps)
    process.kill()
    return process.end()
