"""`train.py` under torchrun, in which one rank does something of its own.

`-m tests.ranks_worker RANK WHAT ARGUMENTS ...`: at the start of step 9, `kill:9` ends that rank,
`stop:9` sends torchrun a SIGTERM and `name:9` names the rank's threads, then and when it ends; any
other WHAT is further options, for that rank alone.
"""

import atexit
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import train
from errors import run_command


def kill(trainer: train.Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(trainer: train.Trainer) -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    while trainer.stop_signal is None:  # torchrun passes it on
        time.sleep(0.01)


def name(trainer: train.Trainer) -> None:
    name_threads()
    atexit.register(name_threads)


def name_threads() -> None:
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    print(f"threads: {', '.join(threads)}", file=sys.stderr)


def act(action, at: int) -> None:
    step = train.Trainer.step

    def acting(self, batch):
        if self.progress.step + 1 == at:
            action(self)
        step(self, batch)

    train.Trainer.step = acting


if __name__ == "__main__":
    rank, what, *arguments = sys.argv[1:]
    sys.argv = ["train.py", *arguments]
    if os.environ["RANK"] == rank:
        action, _, at = what.partition(":")
        if at:
            act({"kill": kill, "stop": stop, "name": name}[action], int(at))
        else:
            sys.argv += shlex.split(what)
    run_command(train.main)
