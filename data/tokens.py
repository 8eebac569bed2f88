"""Turn text files into token ids."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import open_file
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """The token ids (N,) of a text, and the number of UTF-8 bytes that each token covers (N,)."""

    ids: np.ndarray  # uint16 or, for a large vocabulary, uint32
    byte_counts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.ids[part], self.byte_counts[part])


def load_books(paths: Sequence[Path], tokenizer: Tokenizer) -> Tokens:
    """Return the tokens of the books in the given order, separated by end-of-text tokens.

    Raises UserError as `text_files` and `load_tokens` do.
    """
    parts = [load_tokens(book, tokenizer) for book in text_files(paths)]
    if len(parts) == 1:
        return parts[0]

    end_of_text: np.ndarray = np.array([require_end_of_text(tokenizer)], tokenizer.dtype)
    end = Tokens(end_of_text, np.zeros(1, np.uint32))
    joined = [parts[0]]
    for part in parts[1:]:
        joined += [end, part]
    ids = np.concatenate([part.ids for part in joined])
    return Tokens(ids, np.concatenate([part.byte_counts for part in joined]))


def text_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files. A directory is replaced by the `.txt` files in it, sorted by name."""
    files: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):  # Path.is_dir raises if a name is too long
            files.append(path)
            continue
        texts = sorted(text for text in path.glob("*") if text.suffix.lower() == ".txt")
        if not texts:
            raise UserError(f"{path}: contains no .txt files, or cannot be read")
        files += texts
    return files


def require_end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-text token. Raises UserError if the base has no such token."""
    if tokenizer.end_of_text is None:
        raise UserError(
            f"{tokenizer.source}: the tokenizer has no end-of-text token, which "
            "--data, --chat and several books need"
        )
    return tokenizer.end_of_text


def load_tokens(book: Path, tokenizer: Tokenizer) -> Tokens:
    """Return the book's tokens.

    An end-of-text token in the text separates documents. A byte order mark at the start is dropped,
    and line ends are read as `\\n`. Raises UserError for a book that is missing, empty or not text.
    """
    with open_file(book) as file:
        text = _decode(book, file.read())
    try:
        tokens = Tokens(*tokenizer.encode_with_bytes(text))
    except UserError as error:
        raise UserError(f"{book}: {error}") from error
    if not len(tokens):
        raise UserError(f"{book}: contains no tokens; name a text")
    return tokens


def _decode(book: Path, content: bytes) -> str:
    """Return the text of a file. Raises UserError if the file is not a text."""
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{book}: not UTF-8 text (byte {error.start:,}: {error.reason}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{book}: contains a NUL character; not a text")
    return text.replace("\r\n", "\n").replace("\r", "\n")
