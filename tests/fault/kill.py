"""SIGKILL at random moments, resumed each time: the result is that of a run that nobody killed."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fault.runs import Outcome, Process, go_on, result, resume_command, scratch, train_command

PAIRS = (("lora", "fp32"), ("full", "bf16"), ("lora", "bf16"), ("full", "fp32"))
STEPS = {"lora": 20, "full": 6}
KILLS = 50
UNFINISHED = ".checkpoint.safetensors.*"
MOMENTS = ("in the steps", "in the steps", "while a checkpoint is written", "in the steps",
           "right after resuming", "during start-up")


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    for i, (method, precision) in enumerate(PAIRS[:2] if short else PAIRS):
        with scratch() as folder:
            killer = Killer(method, precision, folder, random.Random(seed + i))
            killer.kill((3, 2)[i] if short else KILLS)
        yield Outcome(f"SIGKILL, {method}, {precision} ({killer.in_writing} in the writing of a "
                      "checkpoint)", killer.kills, killer.failures)


class Killer:
    """One method and precision: its uninterrupted run, and runs killed again and again."""

    def __init__(self, method: str, precision: str, folder: Path, draw: random.Random):
        self.method, self.precision, self.folder, self.draw = method, precision, folder, draw
        self.kills = self.in_writing = 0
        self.failures: list[str] = []
        out, began = folder / "whole", time.perf_counter()
        process = Process(self.command(out), folder)
        process.wait_until(process.has_begun)
        self.startup = time.perf_counter() - began
        process.end()
        self.steps = time.perf_counter() - began - self.startup
        self.expected = result(out)

    def command(self, out: Path) -> list[str]:
        return resume_command(train_command(self.method, self.folder, out, STEPS[self.method],
                                            "--precision", self.precision), out)

    def kill(self, count: int) -> None:
        """Kill `count` times; whenever a run gets to its end all the same, begin another."""
        run = 0
        while self.kills < count and not self.failures:
            out = self.folder / f"run{run}"
            run += 1
            while self.kills < count and self.kill_once(out, MOMENTS[self.kills % len(MOMENTS)]):
                pass
            self.failures += [f"after {self.kills} kills: {what}" for what in go_on(
                self.command(out), self.folder, out, self.expected)]

    def kill_once(self, out: Path, moment: str) -> bool:
        """Return False when the run was over before the kill."""
        process = Process(self.command(out), self.folder)
        if moment == "during start-up":
            time.sleep(self.draw.uniform(0, self.startup))
        else:
            process.wait_until(process.has_begun)
            share = {"in the steps": 0.5, "while a checkpoint is written": 0.3}.get(moment, 0.01)
            time.sleep(self.draw.uniform(0, share * self.steps))
        if moment == "while a checkpoint is written":
            process.wait_until(lambda: any(out.glob(UNFINISHED)), 0.3 * self.steps)
        process.kill()
        status, lines = process.end()
        if status != -9:
            self.failures += [f"exit status {status}: {lines[-3:]}"] * (status != 0)
            return False
        self.kills += 1
        self.in_writing += any(out.glob(UNFINISHED))
        return True
