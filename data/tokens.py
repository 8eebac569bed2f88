"""Turn a text file into token ids, and cache them as a memory-mapped file."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import NotWritable, atomic_path, open_file
from data.tokenizer import Tokenizer

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tokens"
HEADER = hashlib.sha256().digest_size  # bytes before the numbers in a cached file
READ_SIZE = 1 << 20  # bytes hashed at a time
PIECE = 1 << 16  # characters tokenized at a time: a library needs far more memory than its ids
BOUNDARY = re.compile(r"\S(?=[ \n])")


@dataclass(frozen=True)
class Tokens:
    """A text's token ids (N,), and how many bytes of its UTF-8 each of them covers (N,)."""

    ids: np.ndarray
    byte_counts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.ids[part], self.byte_counts[part])


def load_books(paths: Sequence[Path], tokenizer: Tokenizer) -> Tokens:
    """Return the tokens of the books in this order, with an end of text between them.

    A directory stands for its `.txt` files, sorted by name. One book is memory-mapped; several are
    joined in memory. Raises UserError as `load_tokens` does, and if a directory has no such file.
    """
    books: list[Path] = []
    for path in paths:
        books += _texts_of(path)

    parts = [load_tokens(book, tokenizer) for book in books]
    if len(parts) == 1:
        return parts[0]

    end_of_text: np.ndarray = np.array([require_end_of_text(tokenizer)], tokenizer.dtype)
    end = Tokens(end_of_text, np.zeros(1, np.uint32))
    joined = [parts[0]]
    for part in parts[1:]:
        joined += [end, part]
    return _join(joined)


def _texts_of(path: Path) -> list[Path]:
    """Return the directory's `.txt` files, sorted by name, or the file itself."""
    if not os.path.isdir(path):  # Path's own test raises where a name is too long
        return [path]
    books = sorted(book for book in path.glob("*") if book.suffix.lower() == ".txt")
    if not books:
        raise UserError(f"{path}: holds no .txt files, or may not be read")
    return books


def _join(parts: Sequence[Tokens]) -> Tokens:
    ids = np.concatenate([part.ids for part in parts])
    return Tokens(ids, np.concatenate([part.byte_counts for part in parts]))


def require_end_of_text(tokenizer: Tokenizer) -> int:
    """Return the end-of-text token's id. Raises UserError if the base has none."""
    if tokenizer.end_of_text is None:
        raise UserError(
            f"{tokenizer.source}: its tokenizer has no end-of-text token, which "
            "--data, --chat and several books need"
        )
    return tokenizer.end_of_text


def load_tokens(book: Path, tokenizer: Tokenizer, cache: Path = CACHE) -> Tokens:
    """Return the book's tokens, memory-mapped from the cache.

    The base's end-of-text token in the text separates documents. A byte order mark at the start is
    dropped, and line ends are read as `\\n`. Raises UserError for a book that is missing, empty or
    not a text in UTF-8.

    The cached file is named by the hashes of the book's bytes and of the tokenizer, and appears
    when whole. It contains a sha256 of that name and the rest, then the byte counts and the ids. A
    file that does not match its hash is made again.
    """
    with open_file(book) as file:
        content = file.read()  # once: a pipe cannot be read again, and a file may change
    name = f"{hashlib.sha256(content).hexdigest()[:32]}-{tokenizer.sha256[:32]}"
    path = cache / f"{name}.bin"
    if os.path.exists(path):
        if _is_whole(path, name):
            return _map(path, tokenizer)
        print(f"warning: {path}: is damaged; making it again", file=sys.stderr)

    parts = _tokenize(book, _decode(book, content), tokenizer)
    try:
        with atomic_path(path) as temporary:
            _write(temporary, name, parts)
    except NotWritable as error:
        print(f"warning: {error}; keeping the tokens in memory", file=sys.stderr)
        return _join(parts)
    return _map(path, tokenizer)


def _map(path: Path, tokenizer: Tokenizer) -> Tokens:
    id_size = np.dtype(tokenizer.dtype).itemsize
    count = (path.stat().st_size - HEADER) // (4 + id_size)
    byte_counts = np.memmap(path, np.uint32, "r", HEADER, (count,))
    ids = np.memmap(path, tokenizer.dtype, "r", HEADER + 4 * count, (count,))
    return Tokens(ids, byte_counts)


def _write(path: Path, name: str, parts: Sequence[Tokens]) -> None:
    digest = hashlib.sha256(name.encode())
    with open(path, "wb") as file:
        file.write(bytes(HEADER))  # space for the hash, which is known at the end
        for array in [part.byte_counts for part in parts] + [part.ids for part in parts]:
            file.write(array.data)
            digest.update(array.data)
        file.seek(0)
        file.write(digest.digest())


def _is_whole(path: Path, name: str) -> bool:
    """Return whether a cached file matches its hash.

    It is read in blocks: hashing its memory map would hold all of it in memory.
    """
    digest = hashlib.sha256(name.encode())
    with open_file(path) as file:
        stored = file.read(HEADER)
        while block := file.read(READ_SIZE):
            digest.update(block)
    return digest.digest() == stored


def _decode(book: Path, content: bytes) -> str:
    """Return the text of a file. Raises UserError if it is not a text."""
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{book}: not UTF-8 text (byte {error.start:,}: {error.reason}); save it as UTF-8"
        ) from error
    if not text:
        raise UserError(f"{book}: is empty; give a text")
    if "\0" in text:
        raise UserError(f"{book}: holds a NUL character; not a text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _tokenize(book: Path, text: str, tokenizer: Tokenizer) -> list[Tokens]:
    """Return the tokens of each piece of a text. Raises UserError, naming the book, for no text."""
    try:
        pieces = _pieces(text, tokenizer.splits_at_spaces)
        parts = [Tokens(*tokenizer.encode_with_bytes(piece)) for piece in pieces]
    except UserError as error:
        raise UserError(f"{book}: {error}") from error
    if not any(map(len, parts)):
        raise UserError(f"{book}: holds no tokens; give a text")
    return parts


def _pieces(text: str, splits_at_spaces: bool) -> Iterator[str]:
    """Yield the text in pieces that tokenize as the whole does.

    A piece ends before white space that follows a visible character. With a tokenizer that may join
    the two, the whole is one piece.
    """
    start = 0
    while splits_at_spaces:
        boundary = BOUNDARY.search(text, start + PIECE)
        if boundary is None:
            break
        yield text[start : boundary.end()]
        start = boundary.end()
    yield text[start:]
