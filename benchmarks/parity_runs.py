"""The parity check's training runs: one here by `train.py`'s own step, one there by PEFT's loop.

Both start from the same initial adapter and see the same batches. `draws` seeds the dropouts, which
both sides draw in one order (`GPT2` in model/gpt2.py).
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ours, peft_loop
from benchmarks.parity_report import snapshot
from common.device import Device
from train import Trainer
from training.options import Options

DROPOUT = 0.1  # GPT-2's own, in any base; mini's config turns it off
NO_DROPOUT = ("--base-dropout", "0", "--lora-dropout", "0")


@dataclass
class Run:
    """Hold the results of one training run. `means`, on PEFT's side, is each step's mean loss."""

    losses: list[float]  # nats a token, a step each
    initial: dict[str, Tensor]  # the adapter before the first step
    adapter: dict[str, Tensor]  # and after the last
    model: Any  # GPT2 here; transformers' or PEFT's model there
    means: list[float] | None = None


def train_options(opts: Namespace, method: str, *more: str) -> Options:
    """Return the options of one run: with all dropouts; `train.py`'s defaults for all the rest."""
    return ours.options(
        method,
        *more,
        base=opts.directory,
        book=opts.book,
        precision="fp32",
        max_steps=opts.steps,
        epochs=opts.steps,
        device=opts.device,
        batch_size=opts.batch_size,
        block_size=opts.block_size,
        base_dropout=DROPOUT,
    )


@contextmanager
def to_the_bit() -> Iterator[None]:
    """Use one thread: more split sums, and not every time alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def store_as_conv1d(model: nn.Module) -> None:
    """Store the frozen projections as transformers does, (in, out): a BLAS may add up the products
    with a transposed matrix in another order.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.t().contiguous().t()


def train_here(args: Options, draws: int, exact: bool = False) -> tuple[Run, Trainer]:
    """Run `train.py`'s steps; `exact`: by PyTorch's own operations, as transformers calls them."""
    trainer = ours.make_trainer(args, fast=not exact)
    if exact:
        store_as_conv1d(trainer.model)
    adapter = ours.adapter_tensors(trainer.model)
    initial = snapshot(adapter)

    torch.manual_seed(draws)
    losses = [ours.step(trainer, batch) for batch in trainer.batches(0)]
    return Run(losses, initial, snapshot(adapter), trainer.model), trainer


def train_there(args: Options, trainer: Trainer, draws: int) -> Run:
    """Run the plain loop on the batches of `trainer`."""
    model = peft_loop.build(args).to(Device.pick(args.device).torch_device)
    initial = snapshot(peft_loop.adapter_tensors(model))

    torch.manual_seed(draws)
    batches = list(trainer.batches(0))
    losses, means = peft_loop.train(model, args, trainer.data.training.tokens, batches)
    return Run(losses, initial, snapshot(peft_loop.adapter_tensors(model)), model, means)


def train_both(args: Options, exact: bool = False) -> tuple[Run, Run]:
    here, trainer = train_here(args, 0, exact)
    return here, train_there(args, trainer, draws=0)
