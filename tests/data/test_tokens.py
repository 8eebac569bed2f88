"""A book becomes tokens in a cache, whatever the book holds and whatever becomes of the cache."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from data import tokens as tokens_module
from data.tokenizer import END_OF_TEXT, FAST, GPT2_FILES, Tokenizer, load_tokenizer
from data.tokens import load_books, load_tokens
from tests.helpers import refusal, small_tokenizer, write_small_tokenizer


def loaded(engine: tokenizers.Tokenizer) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        engine.save(str(Path(directory, FAST)))
        return load_tokenizer(Path(directory), 400)


def small_engine() -> tokenizers.Tokenizer:
    """Return the library's form of SMALL, to be changed."""
    with tempfile.TemporaryDirectory() as directory:
        write_small_tokenizer(Path(directory), 300)
        return tokenizers.Tokenizer.from_file(str(Path(directory, FAST)))


def other_pattern() -> Tokenizer:
    """SMALL, where the word before a space is another than the one at the end of a piece."""
    engine = small_engine()
    split = pre_tokenizers.Split(Regex(r"\p{L}+(?= )|\s|."), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    return loaded(engine)


def prefixed() -> Tokenizer:
    """SMALL, with a space before each text."""
    engine = small_engine()
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return loaded(engine)


def normalized() -> Tokenizer:
    """SMALL, without the blanks around a text."""
    engine = small_engine()
    engine.normalizer = normalizers.Strip()
    return loaded(engine)


def with_token(text: str, **how: bool) -> Tokenizer:
    """SMALL, with one more token."""
    engine = small_engine()
    engine.add_tokens([AddedToken(text, **how)])
    return loaded(engine)


def bert() -> Tokenizer:
    """A WordPiece tokenizer of the characters in PARTS."""
    characters = [*"sa1.é汉😀'", *(f"##{c}" for c in "sa1é汉😀l"), "##ll"]
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *characters])}
    engine = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer()
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return loaded(engine)


GPT2, SMALL = load_tokenizer(GPT2_FILES, 50257), small_tokenizer(300)
OTHER_PATTERN, NORMALIZED, BERT = other_pattern(), normalized(), bert()
WHITE_SPACE = [
    with_token("a '"),
    with_token("1 "),
    with_token("\n\n"),
    with_token("a", rstrip=True),
]
TOKENIZERS = [GPT2, SMALL, OTHER_PATTERN, BERT, prefixed(), NORMALIZED, *WHITE_SPACE]
TEXT = "It's a “book”:\r\n\r\n  日本語\u3000, naïve \u00a0\u00a0 😀😀  \x1c \x85 'll\t\n" * 3
PARTS = [*" \n\r\t'sa1.é汉\u00a0\u3000\x1c\x85\u200d\ufeff😀", END_OF_TEXT, "'ll", "  ", "\n\n\n"]


def whole(text: str, tokenizer: Tokenizer = SMALL) -> list[int]:
    return tokenizer.encode(text.replace("\r\n", "\n").replace("\r", "\n")).tolist()


def write(directory: Path, content: str | bytes) -> Path:
    book = directory / "book.txt"
    book.write_bytes(content if isinstance(content, bytes) else content.encode())
    return book


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(st.sampled_from(PARTS)),
    piece=st.integers(1, 50),
    tokenizer=st.sampled_from(TOKENIZERS),
)
@example(parts=["1", " ", "1", "a", " ", "'"], piece=2, tokenizer=WHITE_SPACE[0])
@example(parts=["1", " ", "1", "a", " ", "'"], piece=2, tokenizer=WHITE_SPACE[1])
@example(parts=["a", "\n", "\n", "a"], piece=2, tokenizer=WHITE_SPACE[2])
@example(parts=["1", "a", " ", "1"], piece=1, tokenizer=WHITE_SPACE[3])
@example(parts=["1", "a", " ", "1"], piece=1, tokenizer=NORMALIZED)
@example(parts=["'ll", " ", "a"], piece=4, tokenizer=OTHER_PATTERN)
def test_a_book_read_in_pieces_has_the_tokens_of_the_whole(parts, piece, tokenizer):
    text = "".join(parts) + "."
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PIECE", piece)
        tokens = load_tokens(write(Path(directory), text), tokenizer, Path(directory) / "cache")
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        ids, byte_counts = tokenizer.encode_with_bytes(text)
        assert tokens.ids.tolist() == ids.tolist()
        assert tokens.byte_counts.tolist() == byte_counts.tolist()


@pytest.mark.parametrize("tokenizer", [SMALL, replace(SMALL, vocab_size=70_000)])
def test_a_book_of_several_pieces_with_a_byte_order_mark_and_a_separator(
    tmp_path, tokenizer, monkeypatch
):
    """The library needs hundreds of bytes a token, so it never gets a large piece."""
    monkeypatch.setattr(tokens_module, "PIECE", 100)
    text = f"a{END_OF_TEXT}\n" + TEXT * 9 + "end"
    pieces = []
    encode = type(tokenizer).encode_with_bytes

    def seen(self, piece):
        pieces.append(piece)
        return encode(self, piece)

    monkeypatch.setattr(type(tokenizer), "encode_with_bytes", seen)
    tokens = load_tokens(write(tmp_path, "\ufeff" + text), tokenizer, tmp_path / "cache").ids
    assert len(pieces) > 10 and max(map(len, pieces)) < 200
    assert tokens.tolist() == whole(text, tokenizer) != whole("\ufeff" + text, tokenizer)
    assert np.flatnonzero(tokens == tokenizer.end_of_text).tolist() == [1]
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == (np.uint32 if tokenizer.vocab_size == 70_000 else np.uint16)


def test_books_are_read_in_order_with_end_of_text_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(load_tokens, "__defaults__", (tmp_path / "cache",))
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
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2  # an entry a book
    assert isinstance(load_books([texts / "b.txt"], GPT2).ids, np.memmap)
    cache, endless = tmp_path / "cache", replace(GPT2, eos_token=None)
    assert "holds no .txt files" in refusal(cache, load_books, [cache], GPT2)
    assert "no end-of-text token" in refusal(GPT2.source, load_books, [texts], endless)


DAMAGES = {
    "cut": lambda data: data[:1000],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "longer": lambda data: data + b"ab",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again_with_one_line(damage, tmp_path, capsys):
    book, cache = write(tmp_path, 20 * TEXT), tmp_path / "cache"
    load_tokens(book, SMALL, cache)
    [path] = cache.iterdir()
    whole_file = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole_file))
    assert capsys.readouterr().err == ""
    assert load_tokens(book, SMALL, cache).ids.tolist() == whole(20 * TEXT)
    assert capsys.readouterr().err == f"warning: {path}: is damaged; making it again\n"
    assert path.read_bytes() == whole_file
    before = path.stat()
    copy = book.rename(tmp_path / "same content, other name")
    assert load_tokens(copy, SMALL, cache).ids.tolist() == whole(20 * TEXT)
    assert capsys.readouterr().err == ""
    assert [*cache.iterdir()] == [path]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_cache_of_another_book_is_not_believed(tmp_path, capsys):
    cache = tmp_path / "cache"
    load_tokens(write(tmp_path, TEXT), SMALL, cache)
    [first] = cache.iterdir()
    load_tokens(write(tmp_path, TEXT + "More."), SMALL, cache)
    [second] = {*cache.iterdir()} - {first}
    second.write_bytes(first.read_bytes())
    assert load_tokens(tmp_path / "book.txt", SMALL, cache).ids.tolist() == whole(TEXT + "More.")
    assert "is damaged" in capsys.readouterr().err


def test_another_book_or_tokenizer_has_its_own_tokens(tmp_path):
    cache = tmp_path / "cache"
    tokenizers = (SMALL, OTHER_PATTERN, with_token("naïve"), replace(SMALL, vocab_size=70_000))
    for text in (TEXT, TEXT + " "):
        for tokenizer in tokenizers:
            tokens = load_tokens(write(tmp_path, text), tokenizer, cache)
            assert tokens.ids.tolist() == whole(text, tokenizer)
    assert len(list(cache.iterdir())) == 2 * len(tokenizers)


def test_an_interrupted_run_leaves_no_cache(tmp_path, monkeypatch):
    def interrupt(path: Path, *_: object) -> None:
        path.write_bytes(b"a part")
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens_module, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokens(write(tmp_path, TEXT), SMALL, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_book_that_is_not_a_text_is_refused(tmp_path):
    cache = tmp_path / "cache"
    for content, tokenizer, reason in (
        (b"\xef\xbb\xbf", GPT2, "is empty"),
        ("café au lait".encode("latin-1"), GPT2, "byte 3: invalid continuation byte"),
        ("日本 ".encode() * 50_000 + b"\xe6 ", GPT2, "byte 350,000: invalid continuation"),
        (b"a b" * 50_000 + b"\0", GPT2, "holds a NUL"),
        (b"a" + b" " * 3_000_000, GPT2, "the tokenizer cannot read the text"),
        (b" \n", BERT, "holds no tokens"),
    ):
        book = write(tmp_path, content)
        assert reason in refusal(book, load_tokens, book, tokenizer, cache)
        assert not list(cache.glob("*"))


def test_a_book_that_changes_meanwhile_is_cached_as_what_was_read(tmp_path, monkeypatch):
    book, cache = write(tmp_path, TEXT), tmp_path / "cache"

    def change(tokenizer: Tokenizer) -> str:
        book.write_text("Another text.")
        return "0" * 64

    monkeypatch.setattr(type(SMALL), "sha256", property(change))  # needed once a book is hashed
    for _ in range(2):
        write(tmp_path, TEXT)
        assert load_tokens(book, SMALL, cache).ids.tolist() == whole(TEXT)
    assert book.read_text() == "Another text."
    assert load_tokens(book, SMALL, cache).ids.tolist() == whole("Another text.")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    (cache := tmp_path / "cache").write_text("a file where the directory should be")
    monkeypatch.setattr(tokens_module, "PIECE", 20)
    tokens = load_tokens(write(tmp_path, TEXT), SMALL, cache).ids
    assert tokens.tolist() == whole(TEXT) and tokens.dtype == np.uint16
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {cache}{os.sep}") and len(warning.splitlines()) == 1
