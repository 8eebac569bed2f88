"""Faults in system calls that write a run's files: calls that fail, are cut short, or crash.

A preloaded library (faulty.c) changes the n-th call under the run's directory, in a fork that runs
`train.py`. Another fork then continues without faults.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from shlex import split

from safetensors import safe_open

from tests.fault.runs import (
    ROOT,
    Fork,
    Outcome,
    arguments,
    differences,
    go_on,
    left,
    result,
    scratch,
    with_resume,
)
from training.checkpoint import content_sha256

KINDS = {  # numbered as in faulty.c
    1: "no space",
    2: "I/O error",
    3: "short write",
    4: "short write, then no space",
    5: "crash before",
    6: "crash after",
}
OF_WRITES = (3, 4)
CRASHES = (5, 6)
CRASHED = 99  # the exit status
LOG = 100  # an unused descriptor
SHORT = 2  # trials of each kind and method in the short form


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    """Run in another process, because the library must be preloaded."""
    with scratch() as folder:
        library = folder / "faulty.so"
        source = Path(__file__).with_name("faulty.c")
        build = [*split("cc -O1 -shared -fPIC -o"), library, source, "-ldl"]
        try:
            subprocess.run(build, check=True, capture_output=True)
        except FileNotFoundError:
            yield Outcome("not run: no C compiler")
            return
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.fault.inject", folder, library, str(seed)]
        command += ["short"] * short
        printed = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
        ).stdout
    yield from (Outcome(**outcome) for outcome in json.loads(printed))


class Injector:
    """Runs of `train.py`, with or without a fault."""

    def __init__(self, folder: Path, library: Path, method: str, draw: bool):
        self.folder = folder
        self.arm = ctypes.CDLL(library).arm
        self.method = method
        self.draw = draw

    def argv(self, out: Path) -> list[str]:
        small = split("--batch-size 8 --eval-every 2 --lr 0.01")
        return arguments(self.method, self.folder, out, 4, *small)

    def run(self, out: Path, target: int = 0, kind: int = 0) -> tuple[int, list[str], list[str]]:
        """Return the exit status, the lines on stderr, and the counted calls."""
        calls = self.folder / "calls"

        def arm() -> None:
            os.dup2(os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), LOG)
            self.arm(os.fsencode(out), target, kind, LOG)

        status, lines = Fork(self.argv(out), self.folder, arm, self.draw).end()
        return status, lines, calls.read_text().splitlines()

    def problems(self, out: Path, target: int, kind: int, expected: dict) -> list[str]:
        """Return the problems after a fault of this kind in this call."""
        status, lines, _ = self.run(out, target, kind)
        wrong = half_files(out)
        if status == 0:  # a short write is completed, and a call may not occur
            wrong += differences(out, expected)
        elif kind not in CRASHES:
            one_line = status in (1, 2) and len(lines) == 1
            if not one_line:
                wrong.append(f"exit status {status}, {lines[-3:]}")
            wrong += left(out)
        elif status != CRASHED:
            wrong.append(f"exit status {status}, not a crash")
        return wrong + go_on(with_resume(self.argv(out), out), self.folder, out, expected)


def half_files(out: Path) -> list[str]:
    """Return the incomplete files among those with final names."""
    wrong = []
    for path in out.glob("[!.]*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}
                    metadata = file.metadata() or {}
                if path.name.startswith("checkpoint"):
                    digest = content_sha256(metadata["state"], tensors)
                    assert metadata["sha256"] == digest, "wrong digest"
        except Exception as error:
            wrong.append(f"{path.name} is half a file: {error}")
    return wrong


def main(folder: Path, library: Path, seed: int, short: bool) -> Iterator[Outcome]:
    for method in ("lora", "full"):
        began = time.perf_counter()
        injector = Injector(folder, library, method, draw=not short)
        out = folder / method
        status, lines, calls = injector.run(out / "whole")
        assert status == 0, lines
        expected = result(out / "whole")
        outcome = Outcome(f"faults at {len(calls)} system calls, {method}")
        for kind, name in KINDS.items():
            targets = [
                i for i, call in enumerate(calls, 1) if kind not in OF_WRITES or call == "write"
            ]
            if short:
                targets = Random(f"{seed}, {kind}").sample(targets, SHORT)
            for target in targets:
                problems = injector.problems(out / f"{kind}-{target}", target, kind, expected)
                outcome.add(f"{method}, call {target} ({calls[target - 1]}), {name}", problems)
        outcome.seconds = time.perf_counter() - began
        yield outcome


if __name__ == "__main__":
    place, library, seed, *short = sys.argv[1:]
    outcomes = main(Path(place), Path(library), int(seed), bool(short))
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
