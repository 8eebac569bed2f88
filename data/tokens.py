"""Turn a text file into a cached, memory-mapped file of token ids."""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from common.errors import UserError
from common.files import NotWritable, atomic_path, file_sha256, open_file
from data.tokenizer import Tokenizer

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tokens"
HEADER = hashlib.sha256().digest_size  # bytes before the ids in a cached file
BLOCK = 1 << 20  # bytes hashed at a time
PIECE = 1 << 16  # characters read at a time, so that memory does not grow with the book
LONGEST_RUN = 1 << 16  # characters without a boundary; tiktoken slows down and fails on long runs
WORDS = re.compile(r"(.*\S(?=[ \n]))?", re.DOTALL)  # up to the last space that follows a word


def load_books(paths: Sequence[Path], tokenizer: Tokenizer) -> np.ndarray:
    """Return the token ids (N,) of the books in this order, with an end-of-text token between them.

    A directory stands for its `.txt` files, sorted by name. One book is memory-mapped; several are
    joined in memory. Raises UserError as `load_tokens` does, and if a directory has no such file.
    """
    books: list[Path] = []
    for path in paths:
        books += _texts_of(path)

    parts = [load_tokens(book, tokenizer) for book in books]
    if len(parts) == 1:
        return parts[0]

    end: np.ndarray = np.array([require_end_of_text(tokenizer)], tokenizer.dtype)
    joined = [parts[0]]
    for part in parts[1:]:
        joined += [end, part]
    return np.concatenate(joined)


def _texts_of(path: Path) -> list[Path]:
    """Return the directory's `.txt` files, sorted by name, or the file itself."""
    if not os.path.isdir(path):  # Path's own test raises where a name is too long
        return [path]
    books = sorted(book for book in path.glob("*") if book.suffix.lower() == ".txt")
    if not books:
        raise UserError(f"{path}: holds no .txt files, or may not be read")
    return books


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

    `<|endoftext|>` in the text separates documents; a byte order mark at the start is dropped, and
    line ends are read as `\\n`. Raises UserError for a book that is missing, empty, not UTF-8 or
    not a text.

    The cached file is named by the hashes of the book's bytes and of the tokenizer, and appears
    when whole. It holds a sha256 of that name and the ids, then the ids. A file that does not match
    its hash is made again.
    """
    name = f"{file_sha256(book)[:32]}-{tokenizer.sha256[:32]}"
    path = cache / f"{name}.bin"
    if os.path.exists(path):
        if _is_whole(path, name):
            return _map(path, tokenizer)
        print(f"warning: {path}: is damaged; making it again", file=sys.stderr)

    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            _write(file, name, _encoded(book, tokenizer))
    except NotWritable as error:
        print(f"warning: {error}; keeping the tokens in memory", file=sys.stderr)
        return np.concatenate([*_encoded(book, tokenizer)])
    return _map(path, tokenizer)


def _map(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    return np.memmap(path, dtype=tokenizer.dtype, mode="r", offset=HEADER)


def _write(file: BinaryIO, name: str, parts: Iterable[np.ndarray]) -> None:
    """Write the hash, then the ids."""
    digest = hashlib.sha256(name.encode())
    file.write(bytes(HEADER))  # space for the hash, which is known at the end
    for ids in parts:
        file.write(ids.data)
        digest.update(ids.data)
    file.seek(0)
    file.write(digest.digest())


def _is_whole(path: Path, name: str) -> bool:
    """Return whether a cached file matches its hash.

    It is read in blocks: hashing its memory map would hold all of it in memory.
    """
    digest = hashlib.sha256(name.encode())
    with open_file(path) as file:
        stored = file.read(HEADER)
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.digest() == stored


def _encoded(book: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the book's token ids, piece by piece. Raises UserError if there are none."""
    count = 0
    for piece in _pieces(book, tokenizer):
        ids = tokenizer.encode(piece)
        count += len(ids)
        yield ids
    if not count:
        raise UserError(f"{book}: holds no tokens; give a text")


def _pieces(book: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text in pieces that tokenize as the whole does.

    Each piece ends before the last white space that follows a visible character. With a tokenizer
    that may join the two, the whole is one piece.
    """
    size = PIECE if tokenizer.splits_at_spaces else -1
    rest = ""
    empty = True
    with open(book, encoding="utf-8-sig") as file:
        while new := _read(file, size):
            if "\0" in new:
                raise UserError(f"{book}: holds a NUL character; not a text")
            empty = False
            text = rest + new
            cut = _last_boundary(text) if tokenizer.splits_at_spaces else len(text)
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


def _last_boundary(text: str) -> int:
    """Return where the last space or new line after a visible character is, or 0."""
    match = WORDS.match(text)
    return match.end() if match else 0


def _read(file: TextIO, size: int) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        offset = file.buffer.tell() - len(error.object) + error.start
        raise UserError(
            f"{file.name}: not UTF-8 text (byte {offset:,}: {error.reason}); save it as plain text"
        ) from error
