"""A text file as a cached, memory-mapped file of uint16 token ids."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import tiktoken

from errors import UserError
from files import atomic_path, read_json, write_json
from model.tokenizer import END_OF_TEXT, RANKS_SHA256, load_tokenizer
from untrusted import check_regular

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tokens"
PIECE = 1 << 16  # characters read at a time: memory does not grow with the book
LONGEST_RUN = 1 << 16  # characters without a boundary; tiktoken slows down and fails on long runs


def load_tokens(book: Path, vocab_size: int, cache: Path = CACHE) -> np.ndarray:
    """The book's token ids (N,), uint16, memory-mapped from the cache.

    The cache entry is named by the hash of the book's bytes and the tokenizer's size, and carries
    the hash of its own content: when anything differs it is built again. `<|endoftext|>` in the
    text is the document separator; a byte order mark before it is dropped. Raises UserError for
    a book that is missing, empty, not UTF-8 or not a text.
    """
    book_hash = file_sha256(book)
    path = cache / f"{book_hash[:32]}-{vocab_size}.bin"
    described = {"book": book_hash, "ranks": RANKS_SHA256, "vocab_size": vocab_size}
    if not _is_whole(path, described):
        encoding = load_tokenizer(vocab_size)
        with atomic_path(path) as temporary:
            with open(temporary, "wb") as file:
                for piece in _pieces(book):
                    file.write(encode(encoding, piece).tobytes())
                if not file.tell():
                    raise UserError(f"{book}: is empty; give a text")
            described["tokens_sha256"] = file_sha256(temporary)
        write_json(path.with_suffix(".json"), described)
    return np.memmap(path, dtype=np.uint16, mode="r")


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids (N,), uint16, of a text."""
    return np.array(encoding.encode(text, allowed_special={END_OF_TEXT}), dtype=np.uint16)


def token_bytes(vocab_size: int) -> np.ndarray:
    """(V,) uint8, the number of UTF-8 bytes each token stands for (128 at most)."""
    encoding = load_tokenizer(vocab_size)
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(vocab_size)]
    return np.array(lengths, dtype=np.uint8)


def file_sha256(path: Path) -> str:
    check_regular(path)  # a pipe cannot be read again, and a device has no end
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(PIECE):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _is_whole(path: Path, described: dict) -> bool:
    try:
        stored = read_json(path.with_suffix(".json"))
        return stored == described | {"tokens_sha256": file_sha256(path)}
    except UserError:  # missing or damaged: it is built again
        return False


def _pieces(book: Path) -> Iterator[str]:
    """The text in pieces that tokenize as the whole does.

    GPT-2's pattern never joins a visible character to white space that follows it, so each
    piece ends before the last white space that follows a visible character.
    """
    rest = ""
    with open(book, encoding="utf-8-sig", newline="") as file:
        while new := _read(file):
            text = rest + new
            cut = _last_boundary(text)
            if cut:
                yield text[:cut]
            rest = text[cut:]
            if len(rest) > LONGEST_RUN:
                raise UserError(f"{book}: {len(rest):,} characters without a space or a new line "
                                "between words; not a text")
    if rest:
        yield rest


def _read(file: TextIO) -> str:
    try:
        return file.read(PIECE)
    except UnicodeDecodeError as error:
        offset = file.buffer.tell() - len(error.object) + error.start
        raise UserError(f"{file.name}: not UTF-8 text (byte {offset:,}: {error.reason}); "
                        "convert it first") from error


def _last_boundary(text: str) -> int:
    """The last index of a space or newline that follows a visible character; 0 if there is none."""
    for i in range(len(text) - 1, 0, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0
