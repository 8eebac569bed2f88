"""Choose the prompt and the text at the page's start, from text that the run did not train on."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data.instructions import read_examples
from data.tokenizer import Tokenizer
from data.tokens import load_books
from data.windows import split
from model.gpt2 import IGNORE_INDEX
from storage.runs import read_run
from training.options import BOOK

DEFAULTS = {"book": [BOOK], "val_fraction": 0.1}
LENGTH = 150  # tokens
SENTENCES = re.compile(r".*[.!?]\S?(?=\s|$)", re.DOTALL)
FIRST_WORDS = re.compile(r"\s*\S+(\s+\S+){,4}")


def first_texts(adapter: Path, tokenizer: Tokenizer, context: int) -> tuple[str, str]:
    """Return a prompt, and a text of at most `context` tokens that begins with the prompt.

    The text comes from the validation part of the run that trained the adapter. If the run or its
    data is missing or damaged, the text comes from data/book.txt.
    """
    length = min(LENGTH, context)
    try:
        options = read_run(adapter)["options"]
        if options["data"]:
            return of_instructions(options, tokenizer, length)
        return of_book(options, tokenizer, length)
    except UserError:
        return of_book(DEFAULTS, tokenizer, length)


def of_book(options: dict[str, Any], tokenizer: Tokenizer, length: int) -> tuple[str, str]:
    """Begin after the first blank line of the validation part. End at the end of a sentence."""
    books = [Path(book) for book in options["book"]]
    if not books:
        raise UserError("the run has neither a book nor data")
    _, validation = split(load_books(books, tokenizer), options["val_fraction"])
    text = decode(tokenizer, validation.ids[: 4 * length])
    _, _, later = text.partition("\n\n")
    text = decode(tokenizer, tokenizer.encode(later if later.strip() else text)[:length])
    sentences = SENTENCES.match(text)
    if sentences:
        text = sentences[0]
    words = FIRST_WORDS.match(text)
    if words is None:
        raise UserError(f"{books[-1]}: the validation part contains no word")
    return words[0], text


def of_instructions(options: dict[str, Any], tokenizer: Tokenizer, length: int) -> tuple[str, str]:
    """Take the first validation example. The prompt ends before the answer."""
    if options["val_data"]:
        validation = read_examples(Path(options["val_data"]), tokenizer, options["block_size"])
    else:
        examples = read_examples(Path(options["data"]), tokenizer, options["block_size"])
        _, validation = split(examples, options["val_fraction"])
    if not validation:
        raise UserError(f"{options['data']}: contains no example to validate on")
    inputs, targets, _ = validation[0]
    answer = int(np.argmax(targets != IGNORE_INDEX)) + 1
    return decode(tokenizer, inputs[:answer]), decode(tokenizer, inputs[:length])


def decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids).strip("\ufffd")  # removes cut-off characters at both ends
