"""The training runs of the parity check: `train.py` here, and PEFT's loop there.

Both sides start from the same adapter and see the same batches. `--seed` seeds the random stream.
This stream first gives the matrix A, and then the dropout masks in the order of `GPT2` in
model/gpt2.py.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import ours, peft_loop
from benchmarks.parity_report import snapshot
from common.device import Device
from data.json_lines import read_lines
from lora.save import WEIGHTS, adapter_state_dict
from training.directory import METRICS
from training.options import Options

DROPOUT = 0.1  # GPT-2's default, for any base: mini's config turns dropout off
NO_DROPOUT = ("--base-dropout", "0", "--lora-dropout", "0")


@dataclass
class Result:
    """The results of one training run. `means`, only on PEFT's side, has each step's mean loss."""

    losses: list[float]  # one per step, nats per token
    initial: dict[str, Tensor]  # the adapter before the first step
    adapter: dict[str, Tensor]  # the adapter after the last step
    model: Any = None  # only on PEFT's side: the model of PEFT or transformers
    means: list[float] | None = None


def arguments(opts: Namespace, method: str, *more: object) -> list[str]:
    """Return `train.py`'s arguments for a run of at most one epoch with all dropouts on.

    Such a run validates before the first step and after the last step, and saves the last adapter.
    """
    return ours.command_line(
        method,
        *more,
        base=opts.directory,
        book=opts.book,
        precision="fp32",
        max_steps=opts.steps,
        epochs=1,
        device=opts.device,
        batch_size=opts.batch_size,
        block_size=opts.block_size,
        base_dropout=DROPOUT,
    )


def train_options(opts: Namespace, method: str, *more: object) -> Options:
    return ours.options(*arguments(opts, method, *more))


@contextmanager
def to_the_bit() -> Iterator[None]:
    """Use one thread, because several threads split sums in an order that varies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_here(argv: list[str]) -> tuple[Result, dict[str, Any]]:
    """Run `train.py ARGV`. Return the contents of `--out`, and `run.json`."""
    args = ours.options(*argv)
    initial = snapshot(adapter_state_dict(ours.Steps(args).model))
    report = ours.run(argv)
    losses = read_lines(args.out / METRICS, lambda line: line["loss"])
    return Result(losses, initial, load_file(args.out / WEIGHTS)), report


def train_here(args: Options) -> Result:
    """Take the steps of `train.py` without writing files."""
    trainer = ours.Steps(args)
    adapter = adapter_state_dict(trainer.model)
    initial = snapshot(adapter)
    losses = [ours.step(trainer, batch) for batch in trainer.batches()]
    return Result(losses, initial, snapshot(adapter))


def train_there(args: Options, draws: int | None = None) -> Result:
    """Run the plain loop on the same batches. `draws` is the seed of independent dropouts."""
    model = peft_loop.build(args).to(Device.pick(args.device).torch_device)
    initial = snapshot(peft_loop.adapter_tensors(model))
    if draws is not None:
        torch.manual_seed(draws)

    training, _ = ours.data(args)
    size = args.batch_size
    order = training.epoch_order(args.seed, 0)
    batches = np.split(order, range(size, len(order), size))[: args.max_steps]
    losses, means = peft_loop.train(model, args, training.tokens, batches)
    return Result(losses, initial, snapshot(peft_loop.adapter_tensors(model)), model, means)


def train_both(args: Options) -> tuple[Result, Result]:
    return train_here(args), train_there(args)
