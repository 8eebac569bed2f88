"""One rank of `scaling.py`: a task as JSON in; rank 0 prints each method's figures, as JSON."""

import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.speed_products import timed
from benchmarks.speed_worker import Task, make_trainer
from errors import run_command
from hardware import keep_freed_memory, peak_memory_mb, pick_device
from training.parallel import Ranks

METHODS = ("lora", "full")


def main() -> None:
    threads, described = sys.argv[1:]
    torch.set_num_threads(int(threads))
    task, ranks = Task(**json.loads(described)), Ranks.of_torchrun()
    device = pick_device(task.device)
    keep_freed_memory()
    with ranks.joined(device):
        print(json.dumps({method: measure(replace(task, method=method), ranks, device)
                          for method in METHODS}))


def measure(task: Task, ranks: Ranks, device: torch.device) -> dict:
    """Seconds and all-reduced bytes of a step, and seconds of its messages alone."""
    torch.manual_seed(ranks.rank)
    # As if the run were longer: its last step would validate and save.
    trainer = make_trainer(replace(task, steps=task.steps + 1), device, ranks)
    trainer.directory, trainer.saved_at = None, time.perf_counter()
    trainer.args.log_every = trainer.args.checkpoint_every = trainer.total_steps
    batches = trainer.batches(0)

    def step() -> None:
        trainer.step(next(batches))
        trainer.after_step(None)

    timed(step, task.warm_up - 1, device)
    sent = messages(step)
    seconds = timed(step, task.steps, device)
    figures = {**asdict(task), "ranks": ranks.count, "threads": torch.get_num_threads(),
               "seconds": seconds, "median": statistics.median(seconds),
               "peak_mb": peak_memory_mb(device), "messages": [t.nbytes for t in sent],
               "bytes": sum(t.nbytes for t in sent)}
    if sent:
        alone = timed(lambda: [dist.all_reduce(t) for t in sent], task.warm_up + task.steps, device)
        figures["all_reduce_seconds"] = statistics.median(alone[task.warm_up:])
    return figures


def messages(step) -> list[torch.Tensor]:
    """What a step gives to all_reduce, which is every collective that it has."""
    sent: list[torch.Tensor] = []
    real = dist.all_reduce

    def kept(tensor: torch.Tensor, *options):
        sent.append(torch.zeros_like(tensor))
        return real(tensor, *options)

    with mock.patch.object(dist, "all_reduce", kept):
        step()
    return sent


if __name__ == "__main__":
    run_command(main)
