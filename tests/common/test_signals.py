"""A signal ends a command with the signal's exit status, and leaves no partial file."""

import fcntl
import os
import signal
import subprocess
import sys
import termios

import pytest

from tests.fault.runs import ROOT
from tests.runs import arguments
from training.checkpoint import CHECKPOINT

pytestmark = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="the tests run under nohup"
)
# A command that writes a file and receives a signal meanwhile, such as `kill` during a merge.
WRITING = """
import os, sys
from pathlib import Path
from common.errors import run_command
from common.files import atomic_path

def main(argv=None):
    with atomic_path(Path(sys.argv[1]) / "out" / "model.safetensors") as temporary:
        temporary.write_text("half a model")
        os.kill(os.getpid(), int(sys.argv[2]))

run_command(main)
"""


def test_a_signal_during_any_commands_writing_leaves_no_file(tmp_path):
    number = signal.SIGTERM
    command = [sys.executable, "-c", WRITING, tmp_path, str(int(number))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (128 + number, "error: interrupted\n")
    assert not list((tmp_path / "out").iterdir())


def test_a_command_under_nohup_outlives_its_terminal(tmp_path):
    command = ["nohup", sys.executable, "-c", WRITING, tmp_path, str(int(signal.SIGHUP))]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_whose_terminal_is_closed_saves(base, book, tmp_path):
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    # Validation prints after each step, which fails once the terminal is gone.
    argv = arguments("lora", base, book, out, "--epochs", 10_000, "--eval-every", 1)
    terminal, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            os.read(terminal, 1 << 16)
            assert process.poll() is None
        os.close(terminal)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert (out / CHECKPOINT).exists() and not list(out.glob(".*"))
