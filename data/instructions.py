"""Read conversations, one per line of a JSON lines file. Only the assistant's text is scored.

A line has one of two forms. Here, both forms contain the same example:

    {"prompt": "Who keeps the light?", "completion": "You do."}
    {"messages": [{"role": "user", "content": "Who keeps the light?"},
                  {"role": "assistant", "content": "You do."}]}

A role can also be `system`. Other roles and other keys are refused. White space around a text is
dropped. The model reads

    User: Who keeps the light?
    Assistant: You do.<|endoftext|>

Only the assistant's content, the space before the content, and the end-of-text token are scored.
The assistant's line ends with the end-of-text token, and every other line ends with a newline.
`CHAT_TEMPLATE` describes the same format to transformers and other programs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.json_lines import read_lines, refuse_unknown
from data.tokenizer import Tokenizer
from data.tokens import require_end_of_text
from data.windows import MOST_HELD_OUT, InputsAndTargets, shuffled, split_off
from model.gpt2 import IGNORE_INDEX

Turn = tuple[str, str]  # a name, such as "User", and a text
NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}
FORMS = (
    'the texts "prompt" and "completion", or "messages", a list of {"role": "user", "assistant" '
    'or "system", "content": text}'
)
# A Jinja template for transformers and llama.cpp. `generation` marks the scored text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- set content = message['content'] | trim -%}
  {%- if message['role'] == 'assistant' -%}
    {{- 'Assistant:' -}}
    {%- generation -%}
      {{- ' ' + content + eos_token -}}
    {%- endgeneration -%}
  {%- elif message['role'] == 'user' -%}
    {{- 'User: ' + content + '\\n' -}}
  {%- elif message['role'] == 'system' -%}
    {{- 'System: ' + content + '\\n' -}}
  {%- else -%}
    {{- raise_exception('the roles are user, assistant and system') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'Assistant:' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Instructions:
    """A dataset of examples, with the interface of `data.windows.Dataset`. See `make_row`."""

    rows: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def inputs_and_targets(self, indices: np.ndarray) -> InputsAndTargets:
        """Return inputs and targets, (B, T) int64 each. T is the length of the longest example.

        Shorter examples are padded on the right. The padding is not scored, and no token of an
        example can see the padding, because the model is causal.
        """
        rows = [self.rows[i] for i in indices]
        longest = max((row.shape[1] for row in rows), default=1)
        padded = np.full((2, len(rows), longest), IGNORE_INDEX, dtype=np.int64)
        for i, row in enumerate(rows):
            padded[:, i, : row.shape[1]] = row[:2]
        inputs, targets = torch.from_numpy(padded)
        return inputs.clamp(min=0), targets

    passes_per_epoch = 1.0

    def num_tokens(self, indices: np.ndarray) -> int:
        return sum(int((self.rows[i][1] != IGNORE_INDEX).sum()) for i in indices)

    @property
    def scored_bytes(self) -> int:
        """Count the UTF-8 bytes of text that `evaluation_batches` scores."""
        return sum(int(row[2][row[1] != IGNORE_INDEX].sum()) for row in self.rows)

    def hold_out(self) -> tuple["Instructions", "Instructions"]:
        rows, held_out = split_off(self.rows, 1, MOST_HELD_OUT)
        return Instructions(rows), Instructions(held_out)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return shuffled(len(self), seed, epoch)

    def evaluation_batches(self, batch_size: int) -> Iterator[InputsAndTargets]:
        for start in range(0, len(self), batch_size):
            yield self.inputs_and_targets(np.arange(start, min(start + batch_size, len(self))))


def read_examples(path: Path, tokenizer: Tokenizer, block_size: int) -> list[np.ndarray]:
    """Return the file's examples as rows of `Instructions`. A row has at most `block_size` tokens.

    Longer examples lose their beginning, and the number of these examples is printed. Empty lines
    are skipped. Raises UserError, with the line's number, for a line that is not an example, and
    for an example whose last completion alone is longer than a block.
    """

    def read(example: dict) -> np.ndarray:
        return make_row(read_turns(example), tokenizer, block_size)

    rows = read_lines(path, read)
    longer = sum(row.shape[1] > block_size for row in rows)
    if longer:
        print(
            f"{path}: {longer:,} of {len(rows):,} examples are longer than a block of "
            f"{block_size} and lose their beginning"
        )
    return [row[:, -block_size:] for row in rows]


def make_row(turns: Sequence[Turn], tokenizer: Tokenizer, block_size: int) -> np.ndarray:
    """Return an array (3, T): inputs, targets, and the number of bytes that each target covers."""
    ids, scored, byte_counts = encode(turns, tokenizer)
    if scored[-block_size - 1 :].all():
        raise ValueError(
            f"the completion is longer than a block of {block_size}; "
            "shorten the completion, or use a larger --block-size"
        )
    labels = np.where(scored, ids, IGNORE_INDEX)
    return np.stack((ids[:-1], labels[1:], byte_counts[1:]))


def encode(
    turns: Sequence[Turn], tokenizer: Tokenizer, ask: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn the turns, such as ("User", "Who?"), into tokens. Return three arrays of length N: the
    token ids, a mask of the scored tokens, and the number of bytes that each token covers.

    With `ask`, the text ends with "Assistant:", for the model to continue. Text between completions
    is tokenized in one piece, because one token may span the end of "User: " and the start of the
    content. For example, if a turn is empty, the space after "User:" and the newline can be one
    token.
    """
    ids: list[int] = []
    scored: list[bool] = []
    byte_counts: list[int] = []

    def add(text: str, is_scored: bool) -> None:
        tokens, counts = tokenizer.encode_with_bytes(text)
        ids.extend(tokens.tolist())
        scored.extend([is_scored] * len(tokens))
        byte_counts.extend(counts.tolist())

    given = ""
    for name, content in turns:
        if name != "Assistant":
            given += f"{name}: {content}\n"
            continue
        add(f"{given}Assistant:", False)
        add(f" {content}", True)
        ids.append(require_end_of_text(tokenizer))
        scored.append(True)
        byte_counts.append(0)
        given = ""
    if ask:
        given += "Assistant:"
    add(given, False)
    return np.array(ids, dtype=np.int32), np.array(scored), np.array(byte_counts, dtype=np.int32)


def read_turns(example: dict) -> list[Turn]:
    """Return the turns of an example. Raises ValueError for JSON that is not an example."""
    try:
        turns = [_turn(message) for message in _messages(example)]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"needs {FORMS}") from error
    if not turns or turns[-1][0] != "Assistant" or ("Assistant", "") in turns:
        raise ValueError("has an empty completion, or no completion at the end")
    return turns


def _messages(example: dict) -> list[dict]:
    """Return the messages of an example in either form."""
    if "messages" in example:
        refuse_unknown(example, {"messages"}, FORMS)
        return example["messages"]
    refuse_unknown(example, {"prompt", "completion"}, FORMS)
    return [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["completion"]},
    ]


def _turn(message: dict) -> Turn:
    refuse_unknown(message, {"role", "content"}, FORMS)
    return NAMES[message["role"]], message["content"].strip()
