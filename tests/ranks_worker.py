"""`train.py` under torchrun, in which one rank does something of its own.

`-m tests.ranks_worker RANK WHAT ARGUMENTS ...`: at the start of a step, `kill:9` ends that rank
and `stop:9` sends torchrun a SIGTERM; any other WHAT is further options, for that rank alone.
"""

import os
import shlex
import signal
import sys
import time

import train
from errors import run_command


def kill(trainer: train.Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(trainer: train.Trainer) -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    while trainer.stop_signal is None:  # torchrun passes it on
        time.sleep(0.01)


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
        name, _, at = what.partition(":")
        if at:
            act({"kill": kill, "stop": stop}[name], int(at))
        else:
            sys.argv += shlex.split(what)
    run_command(train.main)
