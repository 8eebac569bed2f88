"""Start processes of `train.py` like torchrun, but by a fork, because this process imported torch.

The processes print into the files `out` and `err` of a folder.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.run
from torch.distributed.launcher.api import elastic_launch

import train
from common.errors import run_command
from tests.fault.runs import PATIENCE

# The first backward pass starts a thread for each GPU, and a process with such threads cannot fork.
# After torch.compile, a PyTorch for CUDA would count 8 GPUs on a machine without a GPU.
torch.ones(1, requires_grad=True).sum().backward()


def fork(folder: Path, *commands: list[str], during=None) -> tuple[list[int], list[str]]:
    """Start a process for each list of arguments of `train.py`, inside the context `during`.

    Return the processes' statuses and lines on stderr.
    """
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    calls = []
    for number, command in enumerate(commands):
        own = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
        calls.append((_train, command, during, own))
    return _run(folder, *calls)


def torchrun(folder: Path, *words: str) -> tuple[int, list[str]]:
    """Run `torchrun WORDS`, which must run `train.py`. Return its status and its stderr."""
    folder.mkdir()
    [status], lines = _run(folder, (_torchrun, words))
    return status, lines


def _run(folder: Path, *calls: tuple) -> tuple[list[int], list[str]]:
    """Make each call in a separate process."""
    context = multiprocessing.get_context("fork")
    processes = []
    for call, *arguments in calls:
        process = context.Process(target=_print_into, args=(folder, call, *arguments))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(PATIENCE)
    statuses = [process.exitcode for process in processes]
    return statuses, (folder / "err").read_text().splitlines()


def _print_into(folder: Path, call, *arguments) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
    sys.stdout = open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    call(*arguments)


def _train(command: Sequence[str], during=None, environment: dict | None = None) -> None:
    os.environ |= environment or {}
    torch.set_num_threads(1)  # a larger pool does not survive the fork
    with during or nullcontext():
        run_command(train.main, command)


def _torchrun(words: tuple[str, ...]) -> None:
    def fork_ranks(config, entrypoint):
        config.start_method = "fork"
        return lambda _, script, *argv: elastic_launch(config, _train)(argv)

    with mock.patch.object(torch.distributed.run, "elastic_launch", fork_ranks):
        torch.distributed.run.main(words)
