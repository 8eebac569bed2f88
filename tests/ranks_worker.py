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
from common.errors import run_command


def act(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        session = signal.getsignal(signal.SIGTERM).__self__
        os.kill(os.getppid(), signal.SIGTERM)
        while session.stop_signal is None:  # torchrun passes it on
            time.sleep(0.01)
    else:
        name_threads()
        atexit.register(name_threads)


def name_threads() -> None:
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    print(f"threads: {', '.join(threads)}", file=sys.stderr)


def acting(trainer, batch, step=train.Trainer.step) -> None:
    if trainer.progress.step + 1 == int(at):
        act(what)
    step(trainer, batch)


if __name__ == "__main__":
    rank, what, *arguments = sys.argv[1:]
    sys.argv = ["train.py", *arguments]
    what, _, at = what.partition(":")
    if os.environ["RANK"] == rank and at:
        train.Trainer.step = acting
    elif os.environ["RANK"] == rank:
        sys.argv += shlex.split(what)
    run_command(train.main)
