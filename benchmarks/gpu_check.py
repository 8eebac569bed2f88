"""Check the project on a GPU, in about an hour: `make gpu-check` (docs/scaling.md).

Run the project's commands, compare the losses of their runs, and print a line for each step. The
report, runs/gpu-check/report.txt, also contains all output. `--dry-run`: small steps on a CPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

OUT = Path("runs/gpu-check")
REPORT = OUT / "report.txt"
PYTHON = sys.executable
DRY = "--dry-run" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
BLOCK = "--block-size 32" * DRY  # a text times DRY is added in a dry run alone
SIZE = "--max-steps 200" + f" --max-steps 6 --batch-size 2 {BLOCK}" * DRY  # the last options win
RUN = f"train.py lora --base mini --device {DEVICE} --precision fp32 --log-every 1 {SIZE}"
PLAIN = f"{RUN} --lr 3e-3 --overwrite --base-dropout 0 --lora-dropout 0 --out {OUT}"
DROPPING = f"{PYTHON} {RUN} --lr 3e-3 --lora-dropout 0.5 --checkpoint-every 1 --out {OUT}"
TWO = f"{PYTHON} -m torch.distributed.run --standalone --nproc-per-node 2 --"
TEST = f"{PYTHON} -m pytest -q --device {DEVICE} -n 4" + " -n 0 -k use-dora" * DRY
STEP_TEST = "tests/training/test_on_device.py"
ADAPTED = f"--base mini --adapter {OUT}/fp32 --device {DEVICE} --precision fp32"
EVALUATE = f"{PYTHON} evaluate.py {ADAPTED} {BLOCK} --forgotten"
PAGE = "import one_page as page; " + "page.EPOCHS, page.STRIDE = 1, 1024; " * DRY + "page.main()"
LARGE = f"{PYTHON} {PLAIN}/large --stride 1 --block-size 256 --batch-size 16384"


def pytest_sessionstart() -> None:  # as a plugin of pytest
    torch.use_deterministic_algorithms(False)  # tests/conftest.py switches them on


def call(command: str, expected: str = "", status: int = 0) -> None:
    """Run a command. Raise ValueError for another status, or if the output lacks a pattern."""
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    said = ended.stdout + ended.stderr
    with REPORT.open("a") as file:
        file.write(f"\n$ {command}\n{said}")
    if ended.returncode != status:
        raise ValueError(f"status {ended.returncode}: {said.strip().splitlines()[-1:]}")
    if not re.search(expected, said):
        raise ValueError(f"the output lacks {expected!r}")


def losses(name: str) -> list[float]:
    """Return the losses of a run's steps, and the last loss on the validation part."""
    metrics = [json.loads(x) for x in (OUT / name / "metrics.jsonl").read_text().splitlines()]
    return [*(line["loss"] for line in metrics), metrics[-1]["val_loss"]]


def agree(limit: float, name: str, other: str) -> None:
    """Raise ValueError if a loss of the other run differs by more than `limit`, relatively."""
    pairs = zip(losses(name), losses(other), strict=True)
    worst = max(abs(there / here - 1) for here, there in pairs)
    if not worst <= limit:  # NaN too
        raise ValueError(f"a loss of {other} differs from {name} by {worst:.2g}")


def like_fp32(limit: float, *runs: str, by: str = PYTHON) -> None:
    """Train runs, each given by its name and options, and compare them with the run fp32."""
    for words in runs:
        call(f"{by} {PLAIN}/{words}")  # the last options win
        agree(limit, "fp32", words.split()[0])


def start(command: str, name: str) -> subprocess.Popen:
    """Start to train. Return the process when it has taken two steps."""
    metrics = OUT / name / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    words = f"exec {command}/{name} --overwrite > {OUT}/{name}.txt 2>&1"
    process = subprocess.Popen(words, shell=True)
    while process.poll() is None and not (metrics.exists() and "\n{" in metrics.read_text()):
        time.sleep(0.05)
    return process


def stop_and_resume() -> None:
    stopped = start(DROPPING, "stopped")
    stopped.send_signal(signal.SIGINT)
    if stopped.wait(300) != 130:
        raise ValueError(f"Ctrl-C ends the run with status {stopped.returncode}")
    call(f"{DROPPING}/whole --overwrite")
    call(f"{DROPPING}/stopped --resume", "resuming after step")
    agree(1e-3, "whole", "stopped")


def kill_one() -> None:
    launcher = start(DROPPING.replace(PYTHON, TWO), "killed")
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    launcher.wait(300)
    if "is lost" not in (OUT / "killed.txt").read_text():
        raise ValueError("the other process does not report a lost connection")


STEPS: dict[str, Callable[[], None]] = {
    "tests": lambda: call(f"{TEST} {STEP_TEST * DRY}"),
    "tests, not deterministic": lambda: call(f"{TEST} -p benchmarks.gpu_check {STEP_TEST}"),
    "fp32": lambda: like_fp32(1e-3, "fp32", "again", "checkpointed --gradient-checkpointing"),
    "bf16, fp16": lambda: like_fp32(0.01, "bf16 --precision bf16", "fp16 --precision fp16"),
    "--compile": lambda: like_fp32(0.01, "c32 --compile", "c16 --compile --precision bf16"),
    "Ctrl-C, --resume": stop_and_resume,
    "two processes": lambda: like_fp32(1e-3, "two", by=TWO),
    "kill -9": kill_one,
    "QLoRA": lambda: like_fp32(0.1, "nf4 --quantise nf4", "int8 --quantise int8"),
    "DoRA": lambda: like_fp32(0.1, "dora --use-dora"),
    "evaluate.py": lambda: call(EVALUATE, r"KL.* 0\.\d*[1-9]"),
    "generate.py": lambda: call(f"{PYTHON} generate.py {ADAPTED} --with-base --prompt You"),
    "one page": lambda: call(f"{PYTHON} -c '{PAGE}'"),
    "parity": lambda: call(f"{PYTHON} -m benchmarks.parity" + " --exact-only --steps 2" * DRY),
    "bench": lambda: call(f"{PYTHON} -m benchmarks.speed" + " --quick" * DRY),
    "large batch": lambda: call("ulimit -v 8000000; " * DRY + LARGE, "error: out of mem.*\n*$", 1),
}

if DRY:
    del STEPS["--compile"]  # a CPU refuses it
elif torch.cuda.device_count() < 2:
    del STEPS["two processes"], STEPS["kill -9"]


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    REPORT.unlink(missing_ok=True)
    call(f"{PYTHON} -m torch.utils.collect_env")
    lines = []
    for name, step in STEPS.items():
        began = time.monotonic()
        verdict = "passed"
        try:
            step()
        except (OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
            verdict = f"FAILED: {error}"
        lines.append(f"{name}: {verdict} ({time.monotonic() - began:.0f} s)")
        print(lines[-1], flush=True)
    REPORT.write_text("\n".join(lines) + "\n" + REPORT.read_text())
    print(f"Please attach {REPORT} to an issue, also if all steps passed.")
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
