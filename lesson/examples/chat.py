"""Conversations in the chat template of a model, and the mask of the scored tokens."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data.instructions import Instructions, read_turns
from data.json_lines import read_lines
from model.gpt2 import IGNORE_INDEX

Messages = list[dict[str, str]]  # of {"role": ..., "content": ...}


def read_conversations(path: Path) -> list[Messages]:
    """Return the conversations of a file in the forms of `data/instructions.py`. Every conversation
    ends with an answer. Raises UserError with the line number for any other example.
    """

    def read(example: dict) -> Messages:
        turns = read_turns(example)
        return [{"role": name.lower(), "content": content} for name, content in turns]

    return read_lines(path, read)


def examples(conversations: list[Messages], tokenizer: Any) -> Instructions:
    """Return conversations as inputs and targets. Only the answers are targets."""
    rows = []
    for messages in conversations:
        ids, scored = encode(messages, tokenizer)
        labels = np.where(scored, ids, IGNORE_INDEX)
        rows.append(np.stack((ids[:-1], labels[1:])))
    return Instructions(rows)


def encode(messages: Messages, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids (N,) of a conversation, and a mask (N,) of the tokens of answers.

    A template can mark answers by `{% generation %}`. Otherwise, an answer begins after the
    generation prompt and ends with the end-of-turn token. Raises UserError if a later turn changes
    how the template writes an earlier turn.
    """
    ids = template_ids(messages, tokenizer)
    if re.search(r"{%-?\s*generation\b", tokenizer.chat_template):
        marked = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        return ids, np.array(marked["assistant_masks"], dtype=bool)

    scored = np.zeros(len(ids), dtype=bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        question = template_ids(messages[:i], tokenizer, add_generation_prompt=True)
        answered = template_ids(messages[: i + 1], tokenizer)
        start, end = len(question), len(answered)
        if not np.array_equal(ids[:end], answered) or not np.array_equal(ids[:start], question):
            raise UserError("the chat template rewrites earlier turns; use examples of one turn")
        (ends,) = np.nonzero(answered[start:] == tokenizer.eos_token_id)
        if len(ends):  # a template can add a new line, which is not scored
            end = start + ends[-1] + 1
        scored[start:end] = True
    return ids, scored


def template_ids(messages: Messages, tokenizer: Any, **options: bool) -> np.ndarray:
    """Return the token ids (N,) of messages. Raises UserError without a chat template."""
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template; use an Instruct or Chat model")
    found = tokenizer.apply_chat_template(messages, return_dict=True, **options)
    return np.array(found["input_ids"])
