"""Turn text into token ids and back, by byte-pair encoding on tiktoken's engine.

tiktoken needs each token's bytes and rank, and merges the pair of the lowest rank first. A base's
own files say which tokens there are, and their ids (`tokenizer_files.py`).
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def rank_tokens(merges: list[list[str]]) -> list[str]:
    """Return the tokens that merging the listed pairs makes, in the order of tiktoken's ranks.

    Hugging Face merges the listed pairs alone, tiktoken all neighbours that spell a token. Both do
    the same if each token's own characters end in its pair; other tokens are left out.
    """
    rank: dict[tuple[str, str], int] = {}
    for first, second in merges:
        rank.setdefault((first, second), len(rank))
    tokens: dict[str, None] = {}
    for first, second in rank:
        parts = [*(first + second)]
        while len(parts) > 2:
            ranks = [rank.get(pair, len(rank)) for pair in pairwise(parts)]
            if (least := min(ranks)) == len(rank):  # no pair is left to merge
                break
            i = ranks.index(least)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if parts == [first, second]:
            tokens[first + second] = None
    return [*tokens]


@dataclass(frozen=True)
class Tokenizer:
    """Turn text into token ids and back.

    `merges` holds the single bytes and then the merged tokens, in rank order; `ids` the id of each.
    `special` tokens are never split. In a text, `<|endoftext|>` means `end_of_text`, unless the
    base has a token of that name.
    """

    pattern: str
    merges: tuple[bytes, ...]
    ids: tuple[int, ...]
    special: dict[str, int]
    end_of_text: int | None
    vocab_size: int  # the model's: it may be padded beyond the tokenizer's
    source: Path  # the directory of the tokenizer's files

    @cached_property
    def _engine(self) -> tiktoken.Encoding:
        special = {text: len(self.merges) + i for i, text in enumerate(self.special)}
        return tiktoken.Encoding(
            "base",
            pat_str=self.pattern,
            special_tokens=special,
            mergeable_ranks={b: rank for rank, b in enumerate(self.merges)},
        )

    @property
    def dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def _id_of_rank(self) -> np.ndarray:
        return np.array([*self.ids, *self.special.values()], dtype=self.dtype)

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """Map each token's id to its bytes. An id that pads the vocabulary is missing."""
        return dict(zip(self.ids, self.merges, strict=True)) | {
            i: text.encode() for text, i in reversed(self.special.items())
        }

    @cached_property
    def byte_counts(self) -> np.ndarray:
        """Count the UTF-8 bytes that each id stands for, (V,) uint16; 0 for the end of text."""
        counts = np.zeros(self.vocab_size, dtype=np.uint16)
        for token, text in self.bytes_of.items():
            counts[token] = len(text) if token != self.end_of_text else 0
        return counts

    @cached_property
    def sha256(self) -> str:
        """Hash all that decides the ids, so that a token cache knows its tokenizer."""
        parts = (self.pattern, self.merges, self.ids, self.special, self.vocab_size)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids (N,), uint16 or, above 65,536 ids, uint32."""
        return self._id_of_rank[self._engine.encode_to_numpy(text, allowed_special="all")]
