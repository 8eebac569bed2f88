"""Turn a text file into a cached, memory-mapped file of token ids."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from common.errors import UserError
from common.files import NotWritable, atomic_path, file_sha256
from model.tokenizer import PATTERN, Tokenizer

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tokens"
PIECE = 1 << 16  # characters read at a time, so that memory does not grow with the book
WORDS = re.compile(r"(.*\S(?=[ \n]))?", re.DOTALL)  # up to the last space that follows a word
LONGEST_RUN = 1 << 16  # characters without a boundary; tiktoken slows down and fails on long runs


def load_books(paths: Sequence[Path], tokenizer: Tokenizer) -> np.ndarray:
    """Return the token ids (N,) of the books in this order, with an end-of-text token between them.

    A directory stands for its `.txt` files, sorted by name. One book is memory-mapped; several are
    joined in memory. Raises UserError as `load_tokens` does, and if a directory has no such file.
    """
    books = []
    for path in paths:  # os.path, because Path's own test raises where a name is too long
        found = sorted(path.glob("*.txt")) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"{path}: holds no .txt files, or may not be read")
        books += found
    parts = [load_tokens(book, tokenizer) for book in books]
    if len(parts) == 1:
        return parts[0]
    end = np.array([require_end_of_text(tokenizer)], tokenizer.dtype)
    return np.concatenate([ids for part in parts for ids in (end, part)][1:])


def require_end_of_text(tokenizer: Tokenizer) -> int:
    """Return the end-of-text token's id. Raises UserError if the base has none."""
    if tokenizer.end_of_text is None:
        raise UserError(
            f"{tokenizer.source}: its tokenizer has no end-of-text token, which "
            "--data, --chat and several books need"
        )
    return tokenizer.end_of_text


def load_tokens(book: Path, tokenizer: Tokenizer, cache: Path = CACHE) -> np.ndarray:
    """Return the book's token ids (N,), uint16 or uint32, memory-mapped from the cache.

    The cached file is named by the hashes of the book's bytes and of the tokenizer; it appears
    when whole. `<|endoftext|>` in the text separates documents; a byte order mark at the start
    is dropped, and line ends are read as `\\n`. Raises UserError for a book that is missing, empty,
    not UTF-8 or not a text.
    """
    path = cache / f"{file_sha256(book)[:32]}-{tokenizer.sha256[:32]}.bin"
    if not os.path.exists(path):
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                file.writelines(map(tokenizer.encode, _pieces(book, tokenizer)))
        except NotWritable as error:
            print(f"warning: {error}; keeping the tokens in memory", file=sys.stderr)
            return np.concatenate([tokenizer.encode(piece) for piece in _pieces(book, tokenizer)])
    return np.memmap(path, dtype=tokenizer.dtype, mode="r")


def _pieces(book: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text in pieces that tokenize as the whole does.

    GPT-2's pattern never joins a visible character to white space that follows it, so each
    piece ends before the last white space that follows a visible character. With another pattern,
    or a special token in which white space follows a visible character, the whole is one piece.
    """
    whole = tokenizer.pattern != PATTERN or any(len(f"{t}.".split()) > 1 for t in tokenizer.special)
    rest, empty = "", True
    with open(book, encoding="utf-8-sig") as file:
        while new := _read(file, -1 if whole else PIECE):
            text, empty = rest + new, False
            cut = len(text) if whole else WORDS.match(text).end()
            if cut:
                yield text[:cut]
            rest = text[cut:]
            if len(rest) > LONGEST_RUN:
                raise UserError(
                    f"{book}: {len(rest):,} characters without a space or a new line "
                    "between words; not a text"
                )
    if empty:
        raise UserError(f"{book}: is empty; give a text")
    if rest:
        yield rest


def _read(file: TextIO, size: int) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        offset = file.buffer.tell() - len(error.object) + error.start
        raise UserError(
            f"{file.name}: not UTF-8 text (byte {offset:,}: {error.reason}); save it as plain text"
        ) from error
