"""A book becomes tokens, or is refused with a reason."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import END_OF_TEXT, GPT2_FILES, Tokenizer, load_tokenizer
from data.tokens import load_books, load_tokens
from tests.helpers import refusal, small_tokenizer

GPT2, SMALL = load_tokenizer(GPT2_FILES, 50257), small_tokenizer(300)
TEXT = "It's a “book”:\r\n\r\n  日本語\u3000, naïve \u00a0\u00a0 😀😀  \x1c \x85 'll\t\rlone\n" * 3


def whole(text: str, tokenizer: Tokenizer = SMALL) -> list[int]:
    return tokenizer.encode(text.replace("\r\n", "\n").replace("\r", "\n")).tolist()


def write(directory: Path, content: str | bytes) -> Path:
    book = directory / "book.txt"
    book.write_bytes(content if isinstance(content, bytes) else content.encode())
    return book


@pytest.mark.parametrize("tokenizer", [SMALL, replace(SMALL, vocab_size=70_000)])
def test_a_book_with_a_byte_order_mark_and_a_separator(tmp_path, tokenizer):
    text = f"a{END_OF_TEXT}\n" + TEXT + "end"
    tokens = load_tokens(write(tmp_path, "\ufeff" + text), tokenizer)
    expected = whole(text, tokenizer)
    assert tokens.ids.tolist() == expected != whole("\ufeff" + text, tokenizer)
    assert np.flatnonzero(tokens.ids == tokenizer.end_of_text).tolist() == [1]
    assert tokens.ids.dtype == (np.uint32 if tokenizer.vocab_size == 70_000 else np.uint16)


def test_books_are_read_in_order_with_end_of_text_between_them(tmp_path):
    texts = tmp_path / "some texts"
    texts.mkdir()
    for name in ("b.txt", "A.TXT", "notes.md"):
        (texts / name).write_text(f"The text of {name}.\n")
    a, b = (GPT2.encode(f"The text of {name}.\n").tolist() for name in ("A.TXT", "b.txt"))
    end = [GPT2.end_of_text]
    for paths, ids in (([texts / "b.txt"], b), ([texts, texts / "A.TXT"], a + end + b + end + a)):
        tokens = load_books(paths, GPT2)
        assert tokens.ids.tolist() == ids and tokens.ids.dtype == np.uint16
        ends = ids.count(GPT2.end_of_text)
        assert tokens.byte_counts.sum() == len(GPT2.decode(ids)) - ends * len(END_OF_TEXT)
    empty, endless = tmp_path / "empty", replace(GPT2, eos_token=None)
    empty.mkdir()
    assert "contains no .txt files" in refusal(empty, load_books, [empty], GPT2)
    assert "no end-of-text token" in refusal(GPT2.source, load_books, [texts], endless)


def test_a_book_from_a_pipe_is_read_once():
    end, start = os.pipe()
    os.write(start, b"Once upon a time.\n")
    os.close(start)
    tokens = load_books([Path(f"/dev/fd/{end}")], GPT2)
    os.close(end)
    assert tokens.ids.tolist() == GPT2.encode("Once upon a time.\n").tolist()


def test_a_book_that_is_not_a_text_is_refused(tmp_path):
    for content, tokenizer, reason in (
        (b"\xef\xbb\xbf", GPT2, "contains no tokens"),
        ("café au lait".encode("latin-1"), GPT2, "byte 3: invalid continuation byte"),
        ("日本 ".encode() * 50_000 + b"\xe6 ", GPT2, "byte 350,000: invalid continuation"),
        (b"a b" * 50_000 + b"\0", GPT2, "contains a NUL"),
        (b"a" + b" " * 3_000_000, GPT2, "the tokenizer cannot read the text"),
    ):
        book = write(tmp_path, content)
        assert reason in refusal(book, load_tokens, book, tokenizer)
