"""Split a book's tokens, cut them into windows, and make batches of windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from data.tokens import load_books
from model.gpt2 import GPT2Config
from model.tokenizer import Tokenizer

NOT_SCORED = -100  # F.cross_entropy's ignore_index


def split(tokens: np.ndarray | list, val_fraction: float) -> tuple:
    """Return the training part and the validation part, the last `val_fraction` of the tokens."""
    cut = len(tokens) - int(len(tokens) * val_fraction)
    return tokens[:cut], tokens[cut:]


def scored_positions(targets: Tensor) -> Tensor:
    """Return the indices (n,) of the scored targets among `targets` (N,), both on the CPU."""
    return (targets != NOT_SCORED).nonzero().squeeze(1)


def check_block_size(block_size: int, config: GPT2Config) -> None:
    """Raise UserError if a block is longer than the base's context (`n_positions`)."""
    if block_size > config.n_positions:
        raise UserError(f"--block-size {block_size}: the base sees {config.n_positions} tokens "
                        "at most")


@dataclass(frozen=True)
class Windows:
    """`block_size` inputs every `stride` tokens; position t is scored on token t + label_shift."""

    tokens: np.ndarray
    block_size: int
    stride: int
    label_shift: int = 1

    def __len__(self) -> int:
        last = len(self.tokens) - self.block_size - self.label_shift  # where a window may start
        return max(0, last // self.stride + 1)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, (B, T) int64 each, of the windows with these indices."""
        starts = np.asarray(indices) * self.stride  # (B,)
        positions = starts[:, None] + np.arange(self.block_size)  # (B, T), in the text
        inputs, targets = self.tokens[positions], self.tokens[positions + self.label_shift]
        return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))

    def scored_tokens(self, indices: np.ndarray) -> int:
        return len(indices) * self.block_size  # every token of a window is scored

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield consecutive windows, whatever the stride: they score each token once."""
        return text_batches(self.tokens, self.block_size, self.block_size, self.label_shift)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the epoch's order of the windows, a permutation (N,) of their indices."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))


def load_windows(books: Sequence[Path], tokenizer: Tokenizer, *, block_size: int, stride: int,
                 label_shift: int, val_fraction: float) -> tuple[Windows, Windows]:
    """Return the windows of the training part and of the validation part, of all books as one.

    Raises UserError if either part is shorter than a window.
    """
    train_part, val_part = split(load_books(books, tokenizer), val_fraction)
    for name, part in (("training", train_part), ("validation", val_part)):
        if len(part) < block_size + label_shift:
            raise UserError(f"{', '.join(map(str, books))}: its {name} part is {len(part):,} "
                            f"tokens, and a window needs {block_size + label_shift}; use a longer "
                            "book or a smaller block")
    return tuple(Windows(part, block_size, stride, label_shift) for part in (train_part, val_part))


def text_batches(tokens: np.ndarray, block_size: int, stride: int, label_shift: int,
                 batch_size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B, T) that score each token but the first `label_shift` once.

    Windows start every `stride` tokens, at most `block_size`; where they overlap, the first one
    scores. A shorter last window is padded on the right, where a causal model cannot see, and the
    padding is not scored.
    """
    last = max(0, len(tokens) - label_shift - block_size)  # a window from here reaches the end
    starts = np.arange(0, last + stride, stride) if len(tokens) > label_shift else np.arange(0)
    column, end = np.arange(block_size), len(tokens) - 1
    for i in range(0, len(starts), batch_size):
        start = starts[i : i + batch_size, None]  # (B, 1)
        positions = start + column  # (B, T), in the text
        inputs = tokens[np.minimum(positions, end)].astype(np.int64)
        targets = tokens[np.minimum(positions + label_shift, end)].astype(np.int64)
        scored_before = (start > 0) & (column < block_size - stride)  # by the window before
        targets[scored_before | (positions + label_shift > end)] = NOT_SCORED
        yield torch.from_numpy(inputs), torch.from_numpy(targets)
