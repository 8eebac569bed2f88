"""Read conversations, one per line of a JSON lines file; only the assistant's part is scored.

    {"prompt": "Who keeps the light?", "completion": "You do."}
    {"messages": [{"role": "user", "content": "Who keeps the light?"},
                  {"role": "assistant", "content": "You do."}]}

are the same. The third role is `system`. Any other key is refused. White space around a content is
dropped; the model reads

    User: Who keeps the light?
    Assistant: You do.<|endoftext|>

and is scored on the assistant's content, the space before it and the end-of-text token after it.
That token ends the assistant's line; the other lines end with a newline.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import brief, open_file
from data.tokens import LONGEST_RUN, require_end_of_text
from data.windows import NOT_SCORED, shuffled
from model.tokenizer import Tokenizer

NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}
FORMS = (
    'the texts "prompt" and "completion", or "messages", a list of '
    '{"role": "user", "assistant" or "system", "content": text}'
)


@dataclass(frozen=True)
class Instructions:
    """Examples as rows (2, T), inputs over targets, with the interface of `Windows`."""

    rows: list[np.ndarray]
    passes_per_epoch: ClassVar[float] = 1.0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> np.ndarray:
        """Return all rows end to end, (2, N). A run's identity holds their hash."""
        return np.concatenate(self.rows, axis=1)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, (B, T) int64 each; T is the longest of these examples.

        Padding is on the right, where a causal model cannot see, and is not scored.
        """
        rows = [self.rows[i] for i in indices]
        longest = max((row.shape[1] for row in rows), default=1)
        padded = np.full((2, len(rows), longest), NOT_SCORED, dtype=np.int64)
        for i, row in enumerate(rows):
            padded[:, i, : row.shape[1]] = row
        inputs, targets = torch.from_numpy(padded)
        return inputs.clamp(min=0), targets

    def scored_tokens(self, indices: np.ndarray) -> int:
        return sum(int((self.rows[i][1] != NOT_SCORED).sum()) for i in indices)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return shuffled(len(self), seed, epoch)

    def evaluation_batches(self, batch_size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, len(self))))


def read_examples(path: Path, tokenizer: Tokenizer, block_size: int) -> list[np.ndarray]:
    """Return the file's examples as rows of `Instructions`, of `block_size` tokens at most.

    A longer example loses its beginning, and a printed line says how many do. Empty lines are
    skipped. Raises UserError, naming the line, if it is not an example, or if its last completion
    alone is longer than a block.
    """
    rows = []
    with open_file(path) as file:
        lines = iter(lambda: file.readline(LONGEST_RUN + 1), b"")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(_row(line, tokenizer, block_size))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error

    longer = sum(row.shape[1] > block_size for row in rows)
    if longer:
        print(
            f"{path}: {longer:,} of {len(rows):,} examples are longer than a block of "
            f"{block_size} and lose their beginning"
        )
    return [row[:, -block_size:] for row in rows]


def _row(line: bytes, tokenizer: Tokenizer, block_size: int) -> np.ndarray:
    """Return an example's inputs over its targets, (2, T). Raises ValueError for a bad line."""
    ids, scored = encode(_turns(line), tokenizer)
    if scored[-block_size - 1 :].all():
        raise ValueError(
            f"its completion is longer than a block of {block_size}; "
            "shorten it, or use a larger --block-size"
        )
    labels = np.where(scored, ids, NOT_SCORED)
    return np.stack((ids[:-1], labels[1:]))


def encode(turns: list[tuple[str, str]], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids (N,) of turns such as ("User", "Who?"), and a mask of those scored.

    Only the last `LONGEST_RUN` characters of a content are read: they fill any context, and
    tiktoken's regex overflows on a million spaces.
    """
    ids: list[int] = []
    scored: list[bool] = []
    for name, whole in turns:
        content = whole[-LONGEST_RUN:]
        head = tokenizer.encode(f"{name}:").tolist()
        is_scored = name == "Assistant"
        if is_scored:
            body = tokenizer.encode(f" {content}").tolist()
            body.append(require_end_of_text(tokenizer))
        else:
            body = tokenizer.encode(f" {content}\n").tolist()
        ids += head + body
        scored += [False] * len(head) + [is_scored] * len(body)
    return np.array(ids, dtype=np.int32), np.array(scored)


def _turns(line: bytes) -> list[tuple[str, str]]:
    """Return an example's turns. Raises ValueError if the line is not an example."""
    try:
        example = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"is not JSON in UTF-8 of at most {LONGEST_RUN:,} bytes ({error})"
        ) from error
    try:
        turns = [_turn(message) for message in _messages(example)]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"needs {FORMS}") from error
    if not turns or turns[-1][0] != "Assistant" or ("Assistant", "") in turns:
        raise ValueError("has an empty completion, or none at its end")
    if any("\0" in content for _, content in turns):
        raise ValueError("holds a NUL, which is not text")
    return turns


def _messages(example: dict) -> list[dict]:
    """Return an example's messages, whichever of the two forms it has."""
    if "messages" in example:
        _refuse_unknown(example, {"messages"})
        return example["messages"]
    _refuse_unknown(example, {"prompt", "completion"})
    return [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["completion"]},
    ]


def _turn(message: dict) -> tuple[str, str]:
    if message.get("weight", 1) != 1:
        raise ValueError("has a weight, which is not supported: every completion is scored")
    _refuse_unknown(message, {"role", "content", "weight"})
    return NAMES[message["role"]], message["content"].strip()


def _refuse_unknown(fields: dict, known: set[str]) -> None:
    """Raise ValueError for a key that would be ignored."""
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ValueError(f"has the unknown key {brief(unknown[0])}; an example has {FORMS}")
