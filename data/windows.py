"""The split, the windows and the batches (definitions in the README: they must not drift)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOT_SCORED = -100  # F.cross_entropy's ignore_index


def split(tokens: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The book in order: the last `val_fraction` of its tokens are the validation part."""
    cut = len(tokens) - int(len(tokens) * val_fraction)
    return tokens[:cut], tokens[cut:]


@dataclass(frozen=True)
class Windows:
    """`block_size` inputs every `stride` tokens; position t is scored on token t + label_shift."""

    tokens: np.ndarray
    block_size: int
    stride: int
    label_shift: int = 1

    def __len__(self) -> int:
        room = len(self.tokens) - self.block_size - self.label_shift
        return max(0, room // self.stride + 1)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) int64 each, of the windows with these indices."""
        span = np.arange(self.block_size)
        start = (np.asarray(indices) * self.stride)[:, None] + span  # (B, T)
        inputs, targets = self.tokens[start], self.tokens[start + self.label_shift]
        return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """This epoch's order of the windows: a permutation that depends on nothing else."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))


def evaluation_batches(
    tokens: np.ndarray, block_size: int, stride: int, label_shift: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, T) inputs and targets that score each token but the first `label_shift` once.

    Windows start every `stride` tokens; with a stride below the block size, only tokens that no
    earlier window scored count. The last window may be shorter: it is padded on the right, where
    a causal model cannot see, and padding is not scored. Raises ValueError for a stride above the
    block size, which would leave tokens out.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride {stride} is not from 1 to the block size, {block_size}")
    scored = label_shift  # the first position of `tokens` that is still to be scored
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(tokens), stride):
        if scored >= len(tokens):
            break
        inputs = np.zeros(block_size, dtype=np.int64)
        targets = np.full(block_size, NOT_SCORED, dtype=np.int64)
        seen = tokens[start : start + block_size]
        inputs[: len(seen)] = seen
        new = tokens[scored : start + block_size + label_shift]
        first = scored - start - label_shift
        targets[first : first + len(new)] = new
        scored += len(new)
        rows.append((inputs, targets))
        if len(rows) == batch_size:
            yield _stack(rows)
            rows = []
    if rows:
        yield _stack(rows)


def _stack(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))
