"""SIGKILL at random moments, resumed each time: the result is that of a run that nobody killed."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.fault.outcome import Outcome
from tests.fault.process import (
    Process,
    describe,
    differences,
    options,
    result,
    resume_command,
    scratch,
    start,
    train_command,
)

PAIRS = (("lora", "fp32"), ("full", "bf16"), ("lora", "bf16"), ("full", "fp32"))
STEPS = {"lora": 20, "full": 6}
KILLS = 50
MOMENTS = ("in the steps", "in the steps", "while a checkpoint is written", "in the steps",
           "right after resuming", "during start-up")


@dataclass
class Campaign:
    """One method and precision: its uninterrupted run, and runs killed again and again."""

    method: str
    precision: str
    folder: Path
    draw: random.Random
    failures: list[str] = field(default_factory=list)
    kills: int = 0
    in_writing: int = 0

    def command(self, out: Path) -> list[str]:
        return train_command(self.method, *options(
            self.folder, out, STEPS[self.method], "--precision", self.precision))

    def measure(self) -> None:
        """The result to compare with, and how long start-up and steps take."""
        out = self.folder / "whole"
        process = start(self.command(out), self.folder)
        began = time.perf_counter()
        process.wait_until(process.has_begun)
        self.startup = time.perf_counter() - began
        if process.wait():
            raise RuntimeError(describe(self.command(out), process))
        self.steps = time.perf_counter() - began - self.startup
        self.expected = result(out, self.method)

    def kill(self, count: int) -> None:
        """Kill `count` times; whenever a run gets to its end all the same, begin another."""
        run = 0
        while self.kills < count and not self.failures:
            out = self.folder / f"run{run}"
            run += 1
            while self.kills < count and not self.failures:
                if not self.kill_once(out, MOMENTS[self.kills % len(MOMENTS)]):
                    break
            self.end(out)

    def kill_once(self, out: Path, moment: str) -> bool:
        """False when the run was over before the kill."""
        command = resume_command(self.command(out), out)
        process = start(command, self.folder)
        self.wait_for(process, out, moment)
        process.popen.kill()
        status = process.wait()
        if status != -9:
            if status:
                self.failures.append(describe(command, process))
            return False
        self.kills += 1
        self.in_writing += any(out.glob(".checkpoint.pt.*"))
        return True

    def wait_for(self, process: Process, out: Path, moment: str) -> None:
        if moment == "during start-up":
            time.sleep(self.draw.uniform(0, self.startup))
            return
        process.wait_until(process.has_begun)
        if moment == "in the steps":
            time.sleep(self.draw.uniform(0, 0.5 * self.steps))
        elif moment == "while a checkpoint is written":
            time.sleep(self.draw.uniform(0, 0.3 * self.steps))
            process.wait_until(lambda: any(out.glob(".checkpoint.pt.*")), 0.3 * self.steps)
        else:
            time.sleep(self.draw.uniform(0, 0.02))

    def end(self, out: Path) -> None:
        """Let the run get to its end, and compare."""
        command = resume_command(self.command(out), out)
        process = start(command, self.folder)
        if process.wait():
            self.failures.append(describe(command, process))
        else:
            self.failures += [f"{self.method}, {self.precision}: {what} after {self.kills} kills"
                              for what in differences(out, self.method, self.expected)]
            left = [path.name for path in out.glob(".*")]
            self.failures += [f"left behind: {left}"] * bool(left)


def campaign(short: bool, seed: int) -> list[Outcome]:
    outcomes = []
    for i, (method, precision) in enumerate(PAIRS[:2] if short else PAIRS):
        count = (3, 2)[i] if short else KILLS
        began = time.perf_counter()
        with scratch() as folder:
            one = Campaign(method, precision, folder, random.Random(seed + i))
            one.measure()
            one.kill(count)
        outcomes.append(Outcome(
            f"SIGKILL, {method}, {precision} ({one.in_writing} in the writing of a checkpoint)",
            one.kills, one.failures, time.perf_counter() - began))
    return outcomes
