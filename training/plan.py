"""Plan a run: everything that is known before the weights are loaded."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapters.load import choose_quantisation
from common.device import Device
from common.errors import UserError, as_failure
from common.processes import Processes
from data.instructions import Instructions, read_examples
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import load_books
from data.windows import Batch, Dataset, Windows, check_block_size, split
from lora.load import load_adapter_config
from storage.hf_compat import portable_name
from storage.hub import find_base
from storage.weights import load_config
from training.identity import RunIdentity, run_identity
from training.options import LORA_FIELDS, Options


class Data(NamedTuple):
    """The data of a run, and the tokenizer of the base."""

    training: Dataset
    validation: Dataset
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Plan:
    """A run of `train.py` before its weights are loaded."""

    options: Options  # the precision, the base's name and the values of --init-adapter are known
    base_directory: Path
    data: Data
    identity: RunIdentity  # a resumed run must have the identity of the run that it continues
    device: Device
    processes: Processes
    steps_per_epoch: int
    total_steps: int
    micro_batch_size: int  # windows in one forward pass of this process, at most

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yield the batch of each step from `first` on. Seed and epoch decide the order."""
        size = self.options.batch_size
        order = np.empty(0, dtype=np.int64)
        for step in range(first, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == first:
                order = self.data.training.epoch_order(self.options.seed, epoch)
            yield self.batch(order[position * size : (position + 1) * size], self.data.training)

    def batch(self, indices: np.ndarray, data: Dataset) -> Batch:
        """Return this process's share of the windows with these indices (B,)."""
        mine = np.array_split(indices, self.processes.count)[self.processes.number]
        size = self.micro_batch_size
        rows = [
            data.inputs_and_targets(mine[start : start + size])
            for start in range(0, len(mine), size)
        ]
        return Batch(rows, data.num_tokens(indices))

    @property
    def passes(self) -> float:
        """Return how often, on average, the run reads a token of its training part."""
        return self.total_steps / self.steps_per_epoch * self.data.training.passes_per_epoch

    def epoch_ends(self, step: int) -> bool:
        """Return whether an epoch, or the run, ends after `step` steps."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def validation_is_due(self, step: int) -> bool:
        """Return whether to validate after `step` steps: by --eval-every, or as an epoch ends."""
        every = self.options.eval_every
        return self.epoch_ends(step) or bool(every and step % every == 0)


def make_plan(options: Options, device: Device, processes: Processes) -> Plan:
    """Plan the run. Raises UserError for a base or a text that does not fit the options."""
    with processes.main_first():
        base, directory = find_base(options.base)
    options = fill_in(options, base, device)
    identity = run_identity(options, directory)
    processes.check_same(asdict(identity))

    data = load_data(options, directory)
    windows = len(data.training)
    steps_per_epoch = math.ceil(windows / options.batch_size)
    total_steps = options.epochs * steps_per_epoch
    if options.max_steps:
        total_steps = min(total_steps, options.max_steps)
    share = math.ceil(min(options.batch_size, windows) / processes.count)
    return Plan(
        options,
        directory,
        data,
        identity,
        device,
        processes,
        steps_per_epoch,
        total_steps,
        micro_batch_size=math.ceil(share / options.grad_accum),
    )


def fill_in(options: Options, base: str, device: Device) -> Options:
    """Return the options with the values that come from the base, the device and
    `--init-adapter`."""
    filled: dict[str, Any] = {"base": portable_name(base), "precision": device.precision}
    if options.init_adapter:
        with as_failure():
            stored = load_adapter_config(options.init_adapter)
        filled |= {name: getattr(stored, name) for name in LORA_FIELDS}
    if options.method == "lora":
        filled["quantise"] = choose_quantisation(options.quantise, options.init_adapter)
    return replace(options, **filled)


def load_data(options: Options, directory: Path) -> Data:
    """Load the book or the examples of --data, and split them into training and validation data.
    `directory` contains the base.
    """
    config = load_config(directory)
    check_block_size(options.block_size, config)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    if options.data:
        return load_examples(options, options.data, tokenizer)
    return load_book(options, tokenizer)


def load_book(options: Options, tokenizer: Tokenizer) -> Data:
    """Read the book as token ids, keep its end for validation, and cut both parts into windows."""
    block = options.block_size
    shift = options.label_shift
    training, validation = split(load_books(options.book, tokenizer), options.val_fraction)
    for name, part in (("training", training), ("validation", validation)):
        if len(part) < block + shift:
            raise UserError(
                f"{', '.join(map(str, options.book))}: the {name} part has {len(part):,} tokens, "
                f"but a window needs {block + shift}; use a longer book or a smaller block"
            )
    return Data(
        Windows(training.ids, block, options.stride, shift, training.byte_counts),
        # Here the stride is the block size, so that a text is scored once.
        Windows(validation.ids, block, block, shift, validation.byte_counts),
        tokenizer,
    )


def load_examples(options: Options, path: Path, tokenizer: Tokenizer) -> Data:
    """Read conversations, and keep the last ones for validation, unless --val-data has others."""
    training = read_examples(path, tokenizer, options.block_size)
    if options.val_data:
        validation = read_examples(options.val_data, tokenizer, options.block_size)
    else:
        training, validation = split(training, options.val_fraction)
    if not training or not validation:
        raise UserError(
            f"{path}: {len(training)} examples to train on and {len(validation)} to "
            "validate on; at least one of each is needed"
        )
    return Data(Instructions(training), Instructions(validation), tokenizer)
