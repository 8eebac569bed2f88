"""A text file as a cached, memory-mapped file of uint16 token ids."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

from errors import UserError
from files import atomic_path, write_json
from model.tokenizer import END_OF_TEXT, RANKS_SHA256, load_tokenizer

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tokens"
PIECE = 1 << 20  # characters read at a time: memory does not grow with the book
LONGEST_RUN = 1 << 16  # characters without white space; byte-pair merging slows down quadratically


def load_tokens(book: Path, vocab_size: int, cache: Path = CACHE) -> np.ndarray:
    """The book's token ids (N,), uint16, memory-mapped from the cache.

    The cache entry is named by the hash of the book's bytes and the tokenizer's size, and carries
    the hash of its own content: when anything differs it is built again. `<|endoftext|>` in the
    text is the document separator. Raises UserError for a book that is missing, empty, not UTF-8
    or not a text.
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
            described["tokens_sha256"] = file_sha256(temporary)
        write_json(path.with_suffix(".json"), described)
    return np.memmap(path, dtype=np.uint16, mode="r")


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids (N,), uint16, of a text."""
    return np.array(encoding.encode(text, allowed_special={END_OF_TEXT}), dtype=np.uint16)


def token_bytes(vocab_size: int) -> np.ndarray:
    """(V,) the number of UTF-8 bytes each token stands for."""
    encoding = load_tokenizer(vocab_size)
    return np.array([len(encoding.decode_single_token_bytes(i)) for i in range(vocab_size)])


def file_sha256(path: Path) -> str:
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
        stored = json.loads(path.with_suffix(".json").read_text())
        return stored == described | {"tokens_sha256": file_sha256(path)}
    except (OSError, ValueError, UserError):
        return False


def _pieces(book: Path) -> Iterator[str]:
    """The text in pieces that tokenize as the whole does.

    GPT-2's pattern never joins a visible character to white space that follows it, so each
    piece ends before the last white space that follows a visible character.
    """
    rest = ""
    try:
        with open(book, encoding="utf-8", newline="") as file:
            while new := file.read(PIECE):
                text = rest + new
                cut = _last_boundary(text)
                rest = text[cut:]
                if cut:
                    yield text[:cut]
                elif len(rest) > LONGEST_RUN:
                    raise UserError(f"{book}: {len(rest):,} characters without a space or a new "
                                    "line between words; not a text")
    except UnicodeDecodeError as error:
        raise UserError(f"{book}: not UTF-8 text ({error.reason}); convert it first") from error
    if rest:
        yield rest


def _last_boundary(text: str) -> int:
    """The last index of a space or newline that follows a visible character; 0 if there is none."""
    for i in range(len(text) - 1, 0, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0
