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
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.fault.outcome import Outcome
from tests.fault.process import ROOT, differences, result, scratch

KINDS = ("no space", "I/O error", "short write", "short write, then no space", "crash before",
         "crash after")  # numbered from 1 as in faulty.c
CRASHES, CRASHED = (5, 6), 99


def campaign(short: bool, seed: int) -> list[Outcome]:
    """In a process of its own, for the library must be there from the start."""
    with scratch() as folder:
        library = folder / "faulty.so"
        build = ["cc", "-O1", "-shared", "-fPIC", "-o", library,
                 Path(__file__).with_name("faulty.c"), "-ldl"]
        try:
            subprocess.run(build, check=True, capture_output=True)
        except FileNotFoundError:
            return [Outcome("not run: no C compiler", 0, [], 0)]
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        told = subprocess.run(
            [sys.executable, "-m", "tests.fault.inject", folder, library, str(seed),
             *(["short"] if short else [])], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            check=True, text=True)
    return [Outcome(**outcome) for outcome in json.loads(told.stdout)]


class Injector:
    """Runs of `train.py` in forked children, with a fault or without."""

    def __init__(self, folder: Path, library: Path):
        import train
        from model.checkpoint import save_gpt2
        from model.gpt2 import GPT2, GPT2Config
        self.train, self.folder = train, folder
        self.arm = ctypes.CDLL(library).arm
        model = GPT2(GPT2Config(vocab_size=317, n_positions=16, n_embd=16, n_layer=1, n_head=2))
        model.init_weights()
        save_gpt2(model, folder / "base")
        (folder / "book.txt").write_text((ROOT / "data" / "book.txt").read_text()[:3000])

    def arguments(self, method: str, out: Path) -> list[str]:
        return list(map(str, (
            method, "--base", self.folder / "base", "--book", self.folder / "book.txt",
            "--out", out, "--block-size", 16, "--stride", 16, "--batch-size", 8,
            "--max-steps", 4, "--eval-every", 2, "--log-every", 1, "--checkpoint-every", 1,
            "--lr", 0.01, "--device", "cpu")))

    def warm_up(self, method: str) -> None:
        """Once in this process: what is imported on the way, the children then have."""
        sys.argv = ["train.py", *self.arguments(method, self.folder / f"{method}-first")]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            self.train.main()

    def run(self, method: str, out: Path, *options: str, target: int = 0, kind: int = 0
            ) -> tuple[int, list[str], list[str]]:
        """Exit status, lines on stderr, and the calls that were counted."""
        sys.argv = ["train.py", *self.arguments(method, out), *options]
        errors, calls = self.folder / "stderr", self.folder / "calls"
        child = os.fork()
        if not child:
            for path, number in ((self.folder / "stdout", 1), (errors, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            log = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self.arm(os.fsencode(out), target, kind, log)
            self.child()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, errors.read_text().splitlines(), calls.read_text().splitlines()

    def child(self) -> None:
        """The command, in a process that never returns to the campaign."""
        status = 1
        try:
            self.train.run_command(self.train.main)
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stderr.flush()
            os._exit(status)


def problems(injector: Injector, method: str, out: Path, target: int, kind: int, call: str,
             expected: dict) -> list[str]:
    """What is wrong after this call was spoilt so."""
    status, lines, _ = injector.run(method, out, target=target, kind=kind)
    wrong = []
    if status == 0:  # a short write is completed, what only tidies up may fail, a call not come
        wrong += differences(out, method, expected)
    elif kind in CRASHES:
        if status != CRASHED:
            wrong.append(f"exit status {status}, not a crash")
    elif status not in (1, 2) or len(lines) != 1:
        wrong.append(f"exit status {status}, {lines[-3:]}")
    elif left := [path.name for path in out.glob(".*")]:
        wrong.append(f"left behind {left}")
    wrong += half_files(out)
    begun = (out / "metrics.jsonl").exists()
    status, lines, _ = injector.run(method, out, *(["--resume"] if begun else []))
    wrong += [f"going on ends with {status}: {lines[-1:]}"] if status else differences(
        out, method, expected)
    return [f"{method}, call {target} ({call}), {KINDS[kind - 1]}: {what}" for what in wrong]


def half_files(out: Path) -> list[str]:
    """Files under their final names that are not whole."""
    from safetensors import safe_open

    from training.checkpoint import read_checkpoint
    wrong = []
    for path in out.glob("[!.]*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    [file.get_tensor(key) for key in file.keys()]
            elif path.suffix == ".pt" and read_checkpoint(out)[1].name != "checkpoint.pt":
                assert not (out / "checkpoint.pt").exists(), "damaged"
        except Exception as error:
            wrong.append(f"{path.name} is half a file: {error}")
    return wrong


def trials(injector: Injector, method: str, out: Path) -> list[tuple[int, int, str]]:
    """Every call of a run, each kind of fault that it can have."""
    status, lines, calls = injector.run(method, out)
    if status:
        raise RuntimeError(f"the run without a fault ended with {status}: {lines}")
    return [(i, kind, call) for i, call in enumerate(calls, start=1)
            for kind in range(1, len(KINDS) + 1) if call == "write" or kind not in (3, 4)]


def main(folder: Path, library: Path, seed: int, short: bool) -> list[dict]:
    import torch
    torch.set_num_threads(1)
    injector, outcomes = Injector(folder, library), []
    for method in ("lora", "full"):
        began, failures, out = time.perf_counter(), [], folder / method
        injector.warm_up(method)
        chosen = trials(injector, method, out / "whole")
        expected, calls = result(out / "whole", method), len({i for i, _, _ in chosen})
        if short:
            chosen = random.Random(seed).sample(chosen, 20)
        for i, (target, kind, call) in enumerate(chosen):
            failures += problems(injector, method, out / str(i), target, kind, call, expected)
        outcomes.append({"name": f"faults at {calls} system calls, {method}",
                         "tried": len(chosen), "failures": failures,
                         "seconds": time.perf_counter() - began})
    return outcomes


if __name__ == "__main__":
    place, library, seed, *short = sys.argv[1:]
    print(json.dumps(main(Path(place), Path(library), int(seed), bool(short))))
