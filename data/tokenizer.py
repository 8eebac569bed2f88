"""Turn text into token ids and back.

GPT-2's own byte-pair encoding, and mini's, run on tiktoken; every other tokenizer is read by
Hugging Face's `tokenizers`. `tokenizer_files.py` loads either from a base's files.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from common.errors import UserError, first_line

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LONGEST_BLANK = 1 << 17  # characters of white space in a row; tiktoken fails on much longer runs
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that stands for one byte in a SentencePiece model
SPACE = "▁"  # the space in a SentencePiece model


@dataclass(frozen=True)
class Tokenizer(ABC):
    """Turn text into token ids and back.

    `special` tokens are never split. In a text, `<|endoftext|>` means `end_of_text`, unless the
    base has a token of that name.
    """

    special: dict[str, int]
    end_of_text: int | None
    vocab_size: int  # the model's: it may be padded beyond the tokenizer's
    source: Path  # the directory of the tokenizer's files
    files: Mapping[str, bytes]  # their contents by name, to be saved beside a model

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the token ids (N,), uint16 or, above 65,536 ids, uint32."""

    @property
    @abstractmethod
    def bytes_of(self) -> dict[int, bytes]:
        """Map each token's id to its bytes of text. An id that pads the vocabulary is missing."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash all that decides the ids, so that a token cache knows its tokenizer."""

    @property
    @abstractmethod
    def splits_at_spaces(self) -> bool:
        """Whether a text may be cut before a space or new line that follows a visible character:
        the parts then have the tokens of the whole.
        """

    @property
    def dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def byte_counts(self) -> np.ndarray:
        """Count the UTF-8 bytes that each id stands for, (V,) uint16; 0 for the end of text."""
        counts = np.zeros(self.vocab_size, dtype=np.uint16)
        for token, text in self.bytes_of.items():
            counts[token] = len(text)
        if self.end_of_text is not None:
            counts[self.end_of_text] = 0
        return counts


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """GPT-2's byte-pair encoding on tiktoken, which merges the pair of the lowest rank first.

    `merges` holds the single bytes and then the merged tokens, in rank order; `ids` the id of each.
    """

    merges: tuple[bytes, ...]
    ids: tuple[int, ...]

    @cached_property
    def _engine(self) -> tiktoken.Encoding:
        special = {text: len(self.merges) + i for i, text in enumerate(self.special)}
        ranks = {text: rank for rank, text in enumerate(self.merges)}
        return tiktoken.Encoding(
            "base", pat_str=PATTERN, special_tokens=special, mergeable_ranks=ranks
        )

    @cached_property
    def _id_of_rank(self) -> np.ndarray:
        return np.array([*self.ids, *self.special.values()], dtype=self.dtype)

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """Map each token's id to its bytes. An id that pads the vocabulary is missing."""
        texts = dict(zip(self.ids, self.merges, strict=True))
        for text, token in reversed(self.special.items()):
            texts[token] = text.encode()
        return texts

    @cached_property
    def sha256(self) -> str:
        parts = (PATTERN, self.merges, self.ids, self.special, self.vocab_size)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def splits_at_spaces(self) -> bool:
        """GPT-2's pattern never joins a visible character to white space that follows it; a special
        token may.
        """
        return not any(_joins_words(text) for text in self.special)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids (N,). Raises UserError for a text with a very long run of blanks."""
        if len(text) > LONGEST_BLANK:
            for run in re.finditer(r"\s+", text):
                if len(run[0]) > LONGEST_BLANK:
                    raise UserError(f"a text with {len(run[0]):,} blanks in a row is not read")
        return self._id_of_rank[self._engine.encode_to_numpy(text, allowed_special="all")]


@dataclass(frozen=True)
class LibraryTokenizer(Tokenizer):
    """Any other tokenizer, on Hugging Face's `tokenizers`.

    `end_text` is written as the end-of-text token. No tokens are added around a text.
    """

    engine: "tokenizers.Tokenizer"
    end_text: str | None

    @cached_property
    def _settings(self) -> dict:
        settings = json.loads(self.engine.to_str())
        del settings["model"]["vocab"]  # it is large, and `engine` has it
        return settings

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """Map each token's id to the bytes that it adds to a text, as far as the tokenizer tells:
        it may not keep capitals, unknown characters, or how many blanks there were.
        """
        texts = {}
        for word, token in self.engine.get_vocab(with_added_tokens=False).items():
            texts[token] = self._bytes_of_word(word)
        for text, token in self.special.items():
            if text != END_OF_TEXT or token not in texts:  # else it is another token's second name
                texts[token] = text.encode()
        return texts

    def _bytes_of_word(self, word: str) -> bytes:
        model = self._settings["model"]
        if self._is_byte_level:
            byte_of = byte_of_character()
            if all(character in byte_of for character in word):
                return bytes(byte_of[character] for character in word)
            return word.encode()
        if model["type"] == "WordPiece":
            prefix = model["continuing_subword_prefix"]
            if word.startswith(prefix):
                return word.removeprefix(prefix).encode()
            return word.encode() if _stands_without_space(word[0]) else f" {word}".encode()
        byte = BYTE.fullmatch(word)
        if byte:
            return bytes([int(byte[1], 16)])
        suffix = model.get("end_of_word_suffix")
        if suffix and word.endswith(suffix):
            return f"{word.removesuffix(suffix)} ".encode()
        return word.replace(SPACE, " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(
            [self._settings["pre_tokenizer"], self._settings["decoder"]]
        )

    @cached_property
    def byte_counts(self) -> np.ndarray:
        """Count the UTF-8 bytes of `bytes_of`, (V,) uint16; 0 for end of text and unknown text."""
        counts = super().byte_counts
        model = self._settings["model"]
        unknown = model.get("unk_id")
        if model.get("unk_token"):
            unknown = self.engine.token_to_id(model["unk_token"])
        if unknown is not None:
            counts[unknown] = 0
        return counts

    @cached_property
    def sha256(self) -> str:
        parts = (self.engine.to_str(), self.special, self.end_text, self.vocab_size)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def splits_at_spaces(self) -> bool:
        """BERT's words end at white space, and so do those of GPT-2's pattern."""
        for text, added in self._added.items():
            if added["rstrip"] or _joins_words(text):
                return False
        normalizer = self._settings["normalizer"]
        step = self._settings["pre_tokenizer"] or {}
        if step.get("type") == "BertPreTokenizer":
            return normalizer is None or normalizer["type"] == "BertNormalizer"
        is_gpt2s = step.get("type") == "ByteLevel" and step.get("use_regex", True)
        return is_gpt2s and not step["add_prefix_space"] and normalizer is None

    @cached_property
    def _added(self) -> dict[str, dict]:
        return {added["content"]: added for added in self._settings["added_tokens"]}

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids (N,). Raises UserError if the tokenizer cannot represent the text,
        for example because it has no token for unknown characters.
        """
        if self.end_text and END_OF_TEXT not in self._added:
            text = text.replace(END_OF_TEXT, self.end_text)
        try:
            ids = self.engine.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # a lone surrogate, such as JSON's "\ud800"
            raise ValueError("the text is not Unicode") from error
        except Exception as error:  # the library has no class of its own
            raise UserError(
                f"{self.source}: its tokenizer cannot read the text ({first_line(error):.200})"
            ) from error
        return np.array(ids, dtype=self.dtype)


@cache
def byte_of_character() -> dict[str, int]:
    """Map the printable character that spells each byte in a byte-level vocabulary to the byte.

    It is the byte's own character if printable, else one from 256 on (Radford et al. 2019;
    `bytes_to_unicode` in OpenAI's gpt-2 encoder.py).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _joins_words(special: str) -> bool:
    """Return whether white space follows a visible character in a special token."""
    return len(f"{special}.".split()) > 1


def _stands_without_space(character: str) -> bool:
    """Return whether no space is written before a WordPiece token that begins so: it is punctuation
    or one of BERT's Chinese characters.
    """
    code = ord(character)
    is_chinese = 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x2FA1F
    return is_chinese or not character.isalnum()
