"""Start ranks of `train.py` as torchrun does, but by a fork: this process has imported torch.

They print into the files `out` and `err` of a folder.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from common.errors import run_command
from tests.fault.runs import PATIENCE
from tests.helpers import DEVICE
from training.options import ROOT


def fork(folder: Path, *commands: list[str], during=None) -> tuple[list[int], list[str]]:
    """Start a rank for each of these arguments of `train.py`, inside the context `during`.

    Return how they end, and what they wrote on stderr.
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
    ranks = [environment | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(len(commands))]
    if DEVICE == "cpu":
        calls = [
            (be_rank, folder, command, during, rank)
            for command, rank in zip(commands, ranks, strict=True)
        ]
        statuses = _run(*calls)
    else:
        statuses = _start(folder, commands, ranks)
    return statuses, (folder / "err").read_text().splitlines()


def torchrun(folder: Path, command: list[str], during=None) -> tuple[int, list[str]]:
    """Start two ranks by torchrun's agent, their parent; return how it ends, and their stderr."""
    folder.mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    [status] = _run((elastic_launch(config, be_rank), folder, command, during))
    return status, (folder / "err").read_text().splitlines()


def _start(folder: Path, commands: tuple[list[str], ...], ranks: list[dict]) -> list[int]:
    """Start each rank anew, on a GPU of its own: a process that has used one cannot be forked."""
    if DEVICE != "cuda" or torch.cuda.device_count() < len(ranks):
        pytest.skip(f"needs {len(ranks)} GPUs")
    with open(folder / "out", "a") as out, open(folder / "err", "a") as err:
        processes = []
        for command, rank in zip(commands, ranks, strict=True):
            words = [sys.executable, "train.py", *command]
            process = subprocess.Popen(
                words, cwd=ROOT, env=os.environ | rank, stdout=out, stderr=err
            )
            processes.append(process)
        return [process.wait(PATIENCE) for process in processes]


def _run(*calls: tuple) -> list[int]:
    """Make each call in a process of its own; return the exit statuses."""
    context = multiprocessing.get_context("fork")
    processes = []
    for call, *arguments in calls:
        process = context.Process(target=call, args=arguments)
        process.start()
        processes.append(process)
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def be_rank(folder: Path, command: list[str], during, environment: dict | None = None) -> None:
    """Run `train.py` in this process, with its output in the folder's files."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
    sys.stdout = open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    os.environ |= environment or {}
    torch.set_num_threads(1)  # a pool of more does not survive the fork
    with during or nullcontext():
        run_command(train.main, command)
