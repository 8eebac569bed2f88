"""From a book to tokens in a cache."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokens as tokens_module
from data.tokens import encode, load_tokens, token_bytes
from errors import UserError
from model.tokenizer import END_OF_TEXT, load_tokenizer

VOCAB = 300
TEXT = "It's a “book”:\r\n\r\n  日本語\u3000, naïve \u00a0\u00a0 😀😀  \x1c \x85 'll\t\n" * 3
PARTS = [*" \n\r\t'sa1.é汉\u00a0\u3000\x1c\x85\u200d\ufeff😀", END_OF_TEXT, "'ll", "  "]


def whole(text: str, vocab_size: int = VOCAB) -> list[int]:
    return encode(load_tokenizer(vocab_size), text).tolist()


def write(directory: Path, content: str | bytes) -> Path:
    book = directory / "book.txt"
    book.write_bytes(content if isinstance(content, bytes) else content.encode())
    return book


def refused(book: Path, cache: Path) -> str:
    """The one line with which this book is refused; nothing is left in the cache."""
    with pytest.raises(UserError) as error:
        load_tokens(book, VOCAB, cache)
    assert "\n" not in str(error.value) and not list(cache.glob("*"))
    return str(error.value)


# --- tokens ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(parts=st.lists(st.sampled_from(PARTS)), piece=st.integers(1, 50))
def test_a_book_read_in_pieces_has_the_tokens_of_the_whole(parts, piece):
    text = "".join(parts) + "."
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PIECE", piece)
        book = write(Path(directory), text)
        tokens = load_tokens(book, 50257, Path(directory) / "cache")
        assert tokens.tolist() == whole(text.removeprefix("\ufeff"), 50257)


@pytest.mark.parametrize("vocab_size", [VOCAB, 50257])
def test_a_book_of_several_pieces(tmp_path, vocab_size):
    text = TEXT * (3 * tokens_module.PIECE // len(TEXT) + 1) + "end"
    tokens = load_tokens(write(tmp_path, text), vocab_size, tmp_path / "cache")
    assert tokens.tolist() == whole(text, vocab_size)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16


def test_the_separator_is_one_token(tmp_path):
    tokens = load_tokens(write(tmp_path, f"a{END_OF_TEXT}\nb"), VOCAB, tmp_path / "cache")
    assert tokens.tolist() == [*whole("a"), VOCAB - 1, *whole("\nb")]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    tokens = load_tokens(write(tmp_path, "\ufeff" + TEXT), VOCAB, tmp_path / "cache")
    assert tokens.tolist() == whole(TEXT) != whole("\ufeff" + TEXT)


def test_token_bytes_add_up_to_the_text():
    for vocab_size in (257, VOCAB, 50257):
        sizes = token_bytes(vocab_size)
        assert sizes.shape == (vocab_size,)
        for text in (TEXT, END_OF_TEXT):
            assert sizes[whole(text, vocab_size)].sum() == len(text.encode())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_book(tmp_path):
    line = "It was the best of times, it was the worst of times, it was the age of wisdom.\n"
    for megabytes in (2, 16):
        (tmp_path / f"{megabytes}.txt").write_text(line * (megabytes * 1_000_000 // len(line)))
    script = f"""
from pathlib import Path
from data.tokens import load_tokens
for book in ("2.txt", "16.txt"):
    load_tokens(Path({str(tmp_path)!r}, book), 50257, Path({str(tmp_path / "cache")!r}))
    print(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1])
"""
    root = Path(__file__).parent.parent
    output = subprocess.run([sys.executable, "-c", script], cwd=root, text=True, check=True,
                            stdout=subprocess.PIPE).stdout
    small, large = map(int, output.split())  # peak resident memory in KB
    assert small > 10_000 and large - small < 8_000


# --- the cache ---------------------------------------------------------------------------------


def cached(cache: Path) -> tuple[Path, Path]:
    """The cache's only entry: tokens and description."""
    binary, description = sorted(cache.iterdir())
    assert (binary.suffix, description.suffix) == (".bin", ".json")
    return binary, description


def built(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_a_second_run_reads_the_cache(tmp_path):
    book, cache = write(tmp_path, TEXT), tmp_path / "cache"
    load_tokens(book, VOCAB, cache)
    before = [built(path) for path in cached(cache)]
    copy = book.rename(tmp_path / "same content, other name")
    assert load_tokens(copy, VOCAB, cache).tolist() == whole(TEXT)
    assert [built(path) for path in cached(cache)] == before


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change(position: int, how: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda cache: how(cached(cache)[position])


DAMAGES = {
    "tokens cut": change(0, lambda path: os.truncate(path, path.stat().st_size - 2)),
    "tokens cut in a token": change(0, lambda path: os.truncate(path, path.stat().st_size - 1)),
    "tokens emptied": change(0, lambda path: os.truncate(path, 0)),
    "tokens' bit flipped": change(0, flip_a_bit),
    "tokens gone": change(0, Path.unlink),
    "description cut": change(1, lambda path: os.truncate(path, path.stat().st_size // 2)),
    "description no object": change(1, lambda path: path.write_text("[1]")),
    "description no text": change(1, lambda path: path.write_bytes(b"\xff\xfe")),
    "description gone": change(1, Path.unlink),
    "of other ranks": change(1, lambda path: path.write_text(
        path.read_text().replace(tokens_module.RANKS_SHA256, "0" * 64))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_built_again(damage, tmp_path):
    book, cache = write(tmp_path, TEXT), tmp_path / "cache"
    load_tokens(book, VOCAB, cache)
    contents = [path.read_bytes() for path in cached(cache)]
    old = built(cached(cache)[0])
    damage(cache)
    assert load_tokens(book, VOCAB, cache).tolist() == whole(TEXT)
    assert [path.read_bytes() for path in cached(cache)] == contents
    assert built(cached(cache)[0]) != old


def test_another_book_or_vocabulary_has_its_own_tokens(tmp_path):
    cache = tmp_path / "cache"
    for text in (TEXT, TEXT.replace("naïve", "naive"), TEXT + " "):
        for vocab_size in (VOCAB, VOCAB + 1):
            tokens = load_tokens(write(tmp_path, text), vocab_size, cache)
            assert tokens.tolist() == whole(text, vocab_size)
    assert len(list(cache.iterdir())) == 2 * 6


def test_an_interrupted_run_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE", 20)
    calls = iter([encode, encode])
    monkeypatch.setattr(tokens_module, "encode", lambda *args: next(calls, interrupt)(*args))
    with pytest.raises(KeyboardInterrupt):
        load_tokens(write(tmp_path, TEXT), VOCAB, tmp_path / "cache")
    assert next(calls, None) is None and list((tmp_path / "cache").iterdir()) == []


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("a file where the directory should be")
    assert refused(write(tmp_path, TEXT), cache).startswith(f"{cache}{os.sep}")


# --- books that are none -----------------------------------------------------------------------

BAD_BOOKS = {
    "empty": (b"", "is empty"),
    "only a byte order mark": (b"\xef\xbb\xbf", "is empty"),
    "Latin-1": ("café au lait".encode("latin-1"), "byte 3: invalid continuation byte"),
    "after a byte order mark": (b"\xef\xbb\xbfabc\xffdef", "byte 6: invalid start byte"),
    "UTF-16": ("text".encode("utf-16"), "byte 0: invalid start byte"),
    "cut in a character": ("日本".encode()[:-1], "byte 3: unexpected end of data"),
    "far into it": ("日本 ".encode() * 50_000 + b"\xe6 ", "byte 350,000: invalid continuation"),
    "surrogates": (b"abc \xed\xa0\x80", "byte 4: invalid continuation byte"),
    "no spaces": (b"a b" + b"x" * 300_000 + b" c", "characters without a space or a new line"),
    "only blanks": (b"a" + b" " * 3_000_000, "characters without a space or a new line"),
}


@pytest.mark.parametrize("content, reason", BAD_BOOKS.values(), ids=BAD_BOOKS)
def test_a_book_that_is_no_text_is_refused(content, reason, tmp_path):
    book = write(tmp_path, content)
    message = refused(book, tmp_path / "cache")
    assert message.startswith(f"{book}: ") and reason in message


def test_a_book_that_cannot_be_read_is_refused(tmp_path):
    book = tmp_path / "book.txt"
    assert refused(book, tmp_path / "cache").startswith(f"{book}: cannot be read (No such file")
    assert refused(tmp_path, tmp_path / "cache").startswith(f"{tmp_path}: cannot be read (not a")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_book_without_permission_is_refused(tmp_path):
    book, user = write(tmp_path, TEXT), os.geteuid()
    book.chmod(0)
    try:
        if user == 0:  # whom no permission stops
            os.seteuid(65534)
        with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)$"):
            load_tokens(book, VOCAB, tmp_path / "cache")
    finally:
        os.seteuid(user)
