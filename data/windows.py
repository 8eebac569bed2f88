"""Split tokens into training and validation, cut the tokens into windows, and make batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from model.gpt2 import IGNORE_INDEX, GPT2Config

HELD_OUT = 0.1  # of the training data, for the search of the learning rate
MOST_HELD_OUT = 32  # windows or examples, because each short run scores them
InputsAndTargets = tuple[Tensor, Tensor]  # (B, T) int64 each, on the CPU


class Dataset(Protocol):
    """The members of `Windows` and `Instructions` that training and evaluation use."""

    def __len__(self) -> int: ...

    def inputs_and_targets(self, indices: np.ndarray) -> InputsAndTargets:
        """Return inputs and targets of the items (windows or examples) with these indices (B,)."""

    def num_tokens(self, indices: np.ndarray) -> int:
        """Return the number of scored tokens in these windows."""

    @property
    def passes_per_epoch(self) -> float:
        """Return how often, on average, an epoch reads a token."""

    def hold_out(self) -> "tuple[Dataset, Dataset]":
        """Return the parts that a search of the learning rate trains on and scores. The second part
        is the end of the data. If a part would be empty, both parts are all data."""

    @property
    def scored_bytes(self) -> int:
        """Return the number of UTF-8 bytes of text that `evaluation_batches` scores."""

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order of the windows in an epoch: a permutation (N,) of their indices."""

    def evaluation_batches(self, batch_size: int) -> Iterator[InputsAndTargets]:
        """Yield batches that score each token once."""


@dataclass(frozen=True)
class Batch:
    """The windows that this process trains on in one step."""

    micro_batches: Sequence[InputsAndTargets]
    num_tokens: int  # scored tokens of the step, summed over all processes


def batches(data: Dataset, size: int, epochs: int = 1, seed: int = 0) -> Iterator[Batch]:
    """Yield batches of `size` windows, for a loop without a plan (train.py uses `Plan.batches`).
    Each epoch visits every window, in a different order."""
    for epoch in range(epochs):
        order = data.epoch_order(seed, epoch)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            yield Batch([data.inputs_and_targets(indices)], data.num_tokens(indices))


def split(items: Any, val_fraction: float) -> tuple:
    """Return the items for training, and the last `val_fraction` of the items for validation."""
    cut = len(items) - int(len(items) * val_fraction)
    return items[:cut], items[cut:]


def split_off(items: Any, least: int, most: int) -> tuple:
    """Return the items without their last tenth, and the last tenth, cut to its last `most` items.
    If a part would have fewer than `least` items, both parts are all items.
    """
    first, last = split(items, HELD_OUT)
    if min(len(first), len(last)) < least:
        return items, items
    return first, last[-most:]


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `count` windows in an epoch: a permutation (count,) of their indices."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def check_block_size(block_size: int, config: GPT2Config) -> None:
    """Raise UserError if a block is longer than the base's context (`n_positions`)."""
    if block_size > config.n_positions:
        raise UserError(
            f"--block-size {block_size}: the base sees {config.n_positions} tokens at most"
        )


@dataclass(frozen=True)
class Windows:
    """Windows of `block_size` inputs. A window starts every `stride` tokens of the text.

    The target of the input at position t of the text is the token at position t + label_shift.
    """

    tokens: np.ndarray  # the ids (N,) of a text, from data/tokens.py
    block_size: int
    stride: int
    label_shift: int = 1
    byte_counts: np.ndarray | None = None  # UTF-8 bytes of each token, for bits per byte

    def __len__(self) -> int:
        last_start = len(self.tokens) - self.block_size - self.label_shift
        return max(0, last_start // self.stride + 1)

    def inputs_and_targets(self, indices: np.ndarray) -> InputsAndTargets:
        """Return inputs and targets, (B, T) int64 each, of the windows with these indices."""
        starts = np.asarray(indices) * self.stride  # (B,)
        positions = starts[:, None] + np.arange(self.block_size)  # (B, T), in the text
        inputs = self.tokens[positions].astype(np.int64)
        targets = self.tokens[positions + self.label_shift].astype(np.int64)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def num_tokens(self, indices: np.ndarray) -> int:
        return len(indices) * self.block_size  # every token of a window is scored

    @property
    def passes_per_epoch(self) -> float:
        return len(self) * self.block_size / len(self.tokens)

    @property
    def scored_bytes(self) -> int:
        """Count the UTF-8 bytes of text that `evaluation_batches` scores."""
        assert self.byte_counts is not None
        return int(self.byte_counts[self.label_shift :].sum(dtype=np.int64))

    def hold_out(self) -> tuple["Windows", "Windows"]:
        block = self.block_size
        sizes = (block + self.label_shift, MOST_HELD_OUT * block)  # tokens: at least one window
        ids, last_ids = split_off(self.tokens, *sizes)
        counts, last_counts = split_off(self.byte_counts, *sizes)
        training = replace(self, tokens=ids, byte_counts=counts)
        return training, replace(self, tokens=last_ids, byte_counts=last_counts, stride=block)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return shuffled(len(self), seed, epoch)

    def evaluation_batches(self, batch_size: int) -> Iterator[InputsAndTargets]:
        """Yield inputs and targets, (B, T) each. The first `label_shift` tokens are not scored.
        Every other token is scored once.

        The stride must be at most the block size. Where windows overlap, only the first window
        scores the shared tokens. A shorter last window is padded on the right. The padding is not
        scored, and no token of the text can see the padding, because the model is causal.
        """
        length = len(self.tokens)
        # A window that starts at `last_start` reaches the end of the text.
        last_start = max(0, length - self.label_shift - self.block_size)
        starts = np.arange(0, last_start + self.stride, self.stride)
        columns = np.arange(self.block_size)
        in_overlap = columns < self.block_size - self.stride  # also in the previous window

        for i in range(0, len(starts), batch_size):
            start = starts[i : i + batch_size, None]  # (B, 1)
            positions = start + columns  # (B, T): indices into the text
            predicted = positions + self.label_shift

            inputs = self.tokens[np.minimum(positions, length - 1)].astype(np.int64)
            targets = self.tokens[np.minimum(predicted, length - 1)].astype(np.int64)
            scored_before = (start > 0) & in_overlap
            targets[scored_before | (predicted >= length)] = IGNORE_INDEX
            yield torch.from_numpy(inputs), torch.from_numpy(targets)
