"""Ranks of `train.py`: forked ones and, by `-m tests.ranks`, some under torchrun, to which rank 1
sends a SIGTERM at the start of step 12.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import train
from common.errors import run_command
from tests.fault.runs import PATIENCE


def fork(folder: Path, *commands: list[str], during=None) -> tuple[list[int], list[str]]:
    """Start a rank for each of these arguments of `train.py`, as torchrun does, but in processes
    that have imported torch already. Return how they end, and what they wrote on stderr; the file
    `out` has what they printed.
    """
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [multiprocessing.get_context("fork").Process(
        target=be_rank, args=(rank, port, folder, commands, during or nullcontext()))
        for rank in range(len(commands))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
    return [process.exitcode for process in ranks], (folder / "err").read_text().splitlines()


def be_rank(rank: int, port: int, folder: Path, commands: tuple, during) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": str(len(commands)),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["train.py", *commands[rank]]
    torch.set_num_threads(1)  # a pool of more does not survive the fork
    with during:
        run_command(train.main)


def stop(trainer, batch, step=train.Trainer.step) -> None:
    if trainer.progress.step == 11 and os.environ["RANK"] == "1":
        session = signal.getsignal(signal.SIGTERM).__self__
        os.kill(os.getppid(), signal.SIGTERM)
        while session.stop_signal is None:  # torchrun passes it on
            time.sleep(0.01)
    step(trainer, batch)


if __name__ == "__main__":
    sys.argv[0] = "train.py"
    train.Trainer.step = stop
    run_command(train.main)
