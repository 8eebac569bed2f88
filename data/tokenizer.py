"""Turn text into token ids and back.

tiktoken runs the byte-pair encodings of GPT-2 and of the bundled base `mini`. Hugging Face's
`tokenizers` runs all other tokenizers, from `tokenizer.json` or from the byte-level BPE in
`vocab.json` and `merges.txt`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

from common.errors import UserError, first_line
from common.files import brief, open_file, read_json

if TYPE_CHECKING:
    import tokenizers

FAST = "tokenizer.json"
VOCAB = "vocab.json"
MERGES = "merges.txt"
SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
FILES = (FAST, VOCAB, MERGES, SETTINGS, SPECIAL, ADDED, TEMPLATE)
FOREIGN = ("vocab.txt", "tokenizer.model", "spiece.model")  # BERT and SentencePiece, unsupported
GPT2_FILES = Path(__file__).with_name("gpt2_tokenizer")
GPT2_SIZE = 50257
MINI_FILES = Path(__file__).resolve().parents[1] / "model" / "mini"
END_OF_TEXT = "<|endoftext|>"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True)
class Tokenizer(ABC):
    """Turn text into token ids and back."""

    vocabulary: Mapping[str, int]  # token, as spelt in the file -> id
    vocab_size: int  # number of ids of the model, which may exceed len(vocabulary)
    eos_token: str | None  # the end-of-text token
    source: Path  # the directory of the tokenizer's files
    files: Mapping[str, bytes]  # name -> content, to save beside a model
    engine: Any  # the library's tokenizer

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these ids, with U+FFFD for an incomplete character."""

    @abstractmethod
    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (N,), and the number of bytes that each token covers (N,)."""

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids (N,), and the number of UTF-8 bytes of each token, uint32 (N,).

        The ids are uint16, or uint32 for a `vocab_size` above 65,536. An end-of-text token covers 0
        bytes. Raises UserError for a text that cannot be read.
        """
        try:
            ids, byte_counts = self._encode(text)
        except Exception as error:  # the libraries raise various exceptions
            reason = f"{first_line(error):.200}"
            raise UserError(f"the tokenizer cannot read the text ({reason})") from error
        byte_counts = np.where(ids == self.end_of_text, 0, byte_counts)
        return ids.astype(self.dtype), byte_counts.astype(np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids (N,), as `encode_with_bytes` does."""
        return self.encode_with_bytes(text)[0]

    @property
    def end_of_text(self) -> int | None:
        if self.eos_token is None:
            return None
        return self.vocabulary[self.eos_token]

    @property
    def dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @property
    def definition(self) -> dict:
        """Return the content of `tokenizer.json`, or an equivalent made from the other files."""
        if FAST in self.files:
            return json.loads(self.files[FAST])
        return json.loads(self.engine.to_str())


class TiktokenTokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, run by tiktoken. A token's id is the rank of its merge."""

    engine: tiktoken.Encoding

    def decode(self, ids: Iterable[int]) -> str:
        return self.engine.decode([int(token) for token in ids])

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.engine.encode_to_numpy(text, allowed_special="all")
        return ids, self._byte_counts[ids]

    @cached_property
    def _byte_counts(self) -> np.ndarray:
        counts = np.zeros(len(self.vocabulary), dtype=np.uint32)
        for word, token in self.vocabulary.items():
            counts[token] = len(word)  # `word` spells each byte as one character
        return counts


class LibraryTokenizer(Tokenizer):
    """Any other tokenizer, run by Hugging Face's `tokenizers` without adding special tokens."""

    engine: "tokenizers.Tokenizer"

    def decode(self, ids: Iterable[int]) -> str:
        return self.engine.decode([int(token) for token in ids], skip_special_tokens=False)

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        starts = _byte_starts(text)
        encoding = self.engine.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.uint32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # in characters
        if not len(ids):
            return ids, ids
        return ids, _count_bytes(starts, offsets, ids == self.end_of_text)


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of the base in `directory`. `vocab_size` comes from the base's config.

    Without tokenizer files, a model with GPT-2's vocab_size gets GPT-2's tokenizer. Raises
    UserError, naming the file, if the file cannot be read or has tokens that the model lacks.
    """
    path = _main_file(Path(directory), vocab_size)
    source = path.parent
    files = {}
    for name in FILES:
        if (source / name).exists():
            with open_file(source / name) as file:
                files[name] = file.read()

    engine: Any
    kind: type[Tokenizer]
    if files.get(FAST) in [(ours / FAST).read_bytes() for ours in (GPT2_FILES, MINI_FILES)]:
        kind = TiktokenTokenizer
        vocabulary = json.loads(files[FAST])["model"]["vocab"]
        engine = _tiktoken_engine(vocabulary)
    else:
        kind = LibraryTokenizer
        engine = _library_engine(path, files)
        vocabulary = engine.get_vocab(with_added_tokens=True)

    largest = max(vocabulary.values(), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path}: has token {largest}; config.json's vocab_size is {vocab_size}")
    eos_token = _end_of_text(source, vocabulary)
    if eos_token and path.name == VOCAB:  # vocab.json marks no token as special
        engine.add_special_tokens([eos_token])
    return kind(vocabulary, vocab_size, eos_token, source, files, engine)


def _main_file(directory: Path, vocab_size: int) -> Path:
    """Return the path of the vocabulary's file. Raises UserError if no file is supported."""
    if (directory / FAST).exists():
        return directory / FAST
    for name in (*FOREIGN, ADDED):
        if (directory / name).exists():
            raise UserError(
                f"{directory / name}: is not supported; load the tokenizer with transformers' "
                f"AutoTokenizer, and write {FAST} with save_pretrained"
            )
    if (directory / VOCAB).exists() or (directory / MERGES).exists():
        return directory / VOCAB
    if vocab_size == GPT2_SIZE:
        return GPT2_FILES / FAST
    raise UserError(
        f"{directory}: vocab_size {vocab_size} is not GPT-2's {GPT2_SIZE}, and the base has no "
        f"tokenizer: neither {FAST}, nor {VOCAB} and {MERGES}"
    )


def _tiktoken_engine(vocabulary: Mapping[str, int]) -> tiktoken.Encoding:
    byte_of = _byte_of_character()
    ranks = dict(vocabulary)
    special = {END_OF_TEXT: ranks.pop(END_OF_TEXT)}
    merges = {}
    for word, rank in ranks.items():
        merges[bytes([byte_of[character] for character in word])] = rank
    return tiktoken.Encoding(
        "base", pat_str=PATTERN, mergeable_ranks=merges, special_tokens=special
    )


def _library_engine(path: Path, files: Mapping[str, bytes]) -> "tokenizers.Tokenizer":
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        reason = "needs the library tokenizers; pip install -e '.[hub]'"
        raise UserError(f"{path}: {reason}") from error
    try:
        if FAST in files:
            engine = Tokenizer.from_buffer(files[FAST])
        else:
            engine = Tokenizer(models.BPE.from_file(str(path), str(path.with_name(MERGES))))
            engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            engine.decoder = decoders.ByteLevel()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise UserError(f"{path}: cannot be read ({first_line(error)!r:.200})") from error
    engine.no_truncation()
    engine.no_padding()
    return engine


def _end_of_text(source: Path, vocabulary: Mapping[str, int]) -> str | None:
    """Return the eos_token that the tokenizer's settings files name, otherwise END_OF_TEXT if it is
    in the vocabulary."""
    paths = [path for path in (source / SETTINGS, source / SPECIAL) if path.exists()]
    settings = {path: read_json(path) for path in paths}  # a damaged file fails now
    for path, stored in settings.items():
        token = stored.get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token and not (isinstance(token, str) and token in vocabulary):
            raise UserError(f"{path}: eos_token {brief(token)} is not in the vocabulary")
        if token:
            return token
    if END_OF_TEXT in vocabulary:
        return END_OF_TEXT
    return None


def _byte_of_character() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to the byte that it spells.

    A printable byte is spelt as the character with the same code. The other bytes are spelt as
    characters from U+0100 on (Radford et al. 2019, `bytes_to_unicode` in OpenAI's gpt-2
    encoder.py).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _count_bytes(starts: np.ndarray, offsets: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """Return the number of bytes that each token covers (N,). `offsets` (N, 2) has the characters
    where each token begins and ends, and `is_end` (N,) marks end-of-text tokens.

    Bytes that the tokenizer skips, such as spaces, are counted with the next token. But before an
    end-of-text token or the end of the text, they are counted with the last token before them.
    """
    begins, ends = starts[offsets].T
    reached = np.concatenate(([0], np.maximum.accumulate(ends)))
    counts = np.diff(reached)
    skipped = np.append(np.where(is_end, begins - reached[:-1], 0), starts[-1] - reached[-1])
    counts[is_end] = 0
    places = np.where(is_end, np.argmin(is_end), np.arange(len(counts)))  # of tokens with a text
    before = np.maximum.accumulate(places)
    np.add.at(counts, np.append(before, before[-1]), skipped.clip(min=0))
    return counts


def _byte_starts(text: str) -> np.ndarray:
    """Return the UTF-8 byte offset of each character, and of the end of the text, (N + 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate(([0], np.cumsum(sizes)))
