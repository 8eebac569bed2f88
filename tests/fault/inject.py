"""Every system call that writes a run's files, spoilt in turn: failed, cut short, crashed at.

A preloaded library (faulty.c) spoils the n-th call under the run's directory; children forked
after torch is loaded run `train.py` there, then go on without faults.
"""

import ctypes
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open

from tests.fault.runs import ROOT, Outcome, differences, left, result, scratch, train_command
from training.checkpoint import content_sha256

KINDS = (
    "no space",
    "I/O error",
    "short write",
    "short write, then no space",
    "crash before",
    "crash after",
)  # numbered from 1 as in faulty.c
CRASHES = (5, 6)
CRASHED = 99  # the exit status
LOG = 100  # a descriptor that nothing else has


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    """Run in a process of its own, for the library must be there from the start."""
    with scratch() as folder:
        library = folder / "faulty.so"
        build = [
            "cc",
            "-O1",
            "-shared",
            "-fPIC",
            "-o",
            library,
            Path(__file__).with_name("faulty.c"),
            "-ldl",
        ]
        try:
            subprocess.run(build, check=True, capture_output=True)
        except FileNotFoundError:
            yield Outcome("not run: no C compiler")
            return
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "tests.fault.inject",
            folder,
            library,
            str(seed),
            "short" * short,
        ]
        printed = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
        ).stdout
    yield from (Outcome(**outcome) for outcome in json.loads(printed))


class Injector:
    """Runs of `train.py` in forked children, with a fault or without."""

    def __init__(self, folder: Path, library: Path):
        import torch

        import train
        from tests.helpers import tiny_gpt2_directory

        torch.set_num_threads(1)
        self.train = train
        self.folder = folder
        self.arm = ctypes.CDLL(library).arm
        tiny_gpt2_directory(folder / "base", n_positions=16, n_embd=16, n_layer=1, n_head=2)
        for method in ("lora", "full"):  # what is imported on the way, the children then have
            self.set_command(method, folder / f"{method}-first")
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                train.main()

    def set_command(self, method: str, out: Path, *options: str) -> None:
        sys.argv = train_command(
            method,
            self.folder,
            out,
            4,
            "--base",
            self.folder / "base",
            "--block-size",
            16,
            "--stride",
            16,
            "--batch-size",
            8,
            "--eval-every",
            2,
            "--lr",
            0.01,
            *options,
        )[1:]

    def run(
        self, method: str, out: Path, *options: str, target: int = 0, kind: int = 0
    ) -> tuple[int, list[str], list[str]]:
        """Return the exit status, the lines on stderr, and the calls that were counted."""
        self.set_command(method, out, *options)
        files = [self.folder / name for name in ("stdout", "stderr", "calls")]
        child = os.fork()
        if not child:  # a process that must never return to the campaign
            status = 1
            try:
                for number, file in zip((1, 2, LOG), files, strict=True):
                    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                self.arm(os.fsencode(out), target, kind, LOG)
                self.train.run_command(self.train.main)
            except SystemExit as ended:
                status = ended.code
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, *(file.read_text().splitlines() for file in files[1:])

    def problems(self, method: str, out: Path, target: int, kind: int, expected: dict) -> list[str]:
        """Return what is wrong after this call was spoilt so."""
        status, lines, _ = self.run(method, out, target=target, kind=kind)
        wrong = half_files(out)
        if status == 0:  # a short write is completed, a call may not come
            wrong += differences(out, expected)
        elif kind not in CRASHES:
            one_line = status in (1, 2) and len(lines) == 1
            if not one_line:
                wrong.append(f"exit status {status}, {lines[-3:]}")
            wrong += left(out)
        elif status != CRASHED:
            wrong.append(f"exit status {status}, not a crash")

        more = ["--resume"] if (out / "metrics.jsonl").exists() else []
        status, lines, _ = self.run(method, out, *more)
        if status:
            return [*wrong, f"going on ends with {status}: {lines[-1:]}"]
        return wrong + differences(out, expected)


def half_files(out: Path) -> list[str]:
    """Return the files under their final names that are not whole."""
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
    injector = Injector(folder, library)
    for method in ("lora", "full"):
        began = time.perf_counter()
        out = folder / method
        _, lines, calls = injector.run(method, out / "whole")
        assert not lines, lines
        trials = []
        for i, call in enumerate(calls, start=1):
            kinds = [1, 2, 3, 4, 5, 6] if call == "write" else [1, 2, 5, 6]
            trials += [(i, kind, call) for kind in kinds]
        if short:
            trials = random.Random(seed).sample(trials, 20)
        outcome = Outcome(f"faults at {len(calls)} system calls, {method}")
        for i, (target, kind, call) in enumerate(trials):
            outcome.add(
                f"{method}, call {target} ({call}), {KINDS[kind - 1]}",
                injector.problems(method, out / str(i), target, kind, result(out / "whole")),
            )
        outcome.seconds = time.perf_counter() - began
        yield outcome


if __name__ == "__main__":
    place, library, seed, short = sys.argv[1:]
    outcomes = main(Path(place), Path(library), int(seed), bool(short))
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
