"""The tokenizer against transformers' own, which is built here from the same ranks."""

import base64
import hashlib
import json
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from data.tokens import encode
from errors import UserError
from model import tokenizer
from model.tokenizer import END_OF_TEXT, RANKS, load_tokenizer

SIZES = [257, 300, 8192, 50257]
LINES = [line.split() for line in RANKS.read_bytes().splitlines()]
TOKENS = [base64.b64decode(token) for token, _ in LINES]
HIDDEN = [b for b in range(256) if not chr(b).isprintable() or b == ord(" ")]
VISIBLE = {b: 256 + i for i, b in enumerate(HIDDEN)}
build = load_tokenizer.__wrapped__  # load_tokenizer without its memory of earlier calls

SAMPLES = {
    "prose": "It was a bright cold day in April, and the clocks were striking thirteen.",
    "contractions": "I'm we'll don't they've you're he'd IT'S l'Tour a'So ''s 's'll rock'n'roll",
    "digits": "3.14159 1,000,000 0x1F 2024-05-17 12th ٣٤٥ ½ Ⅻ ²",
    "code": "def f(x):\n    return {'a': x[-1]}  # ~`!@#$%^&*()_+-=|\\",
    "accents": "naïve café Ærøskøbing Füße Đà Nẵng İstanbul ﬁne",
    "CJK": "春眠不覺曉,處處聞啼鳥。 吾輩は猫である。 나는 고양이로소이다",
    "emoji": "😀😀 👩‍👩‍👧‍👦 👍🏽 🇮🇸 ❤️ ☃",
    "combining": "e\u0301 n\u0303o a\u0301\u0323 क्षि \u0301lone \u0301",
    "right to left": "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "blanks": "a b  c   d    \u00a0e\u00a0\u00a0f \u2003g \u3000h \u200bi",
    "tabs": "a\tb\t\tc \t d\t ",
    "lines": "one\r\ntwo\r\n\r\nthree\rfour\n\n\n\nfive\n  six\v\f\u2028\u2029",
    "trailing": "the end   \n \n",
    "only white space": " \n\n  \t ",
    "controls": "".join(map(chr, range(0x20))) + "a\x1cb \x1d c\x1e\x1f\x7f\x85d \x85 \x80\x9f\0",
    "separator": f"one{END_OF_TEXT}two {END_OF_TEXT} \n{END_OF_TEXT}{END_OF_TEXT}<|endoftext |>",
    "empty": "",
    "one long word": "ab" * 3000,
}
PARTS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\x1c", "\x85", "'s", "'LL", "'", "the", " The",
         "1", "...", "é", "\u0301", "汉", "😀", "\u200d", "\ufeff", END_OF_TEXT, "<|endof"]
ASSIGNED = st.characters(exclude_categories=("Cn", "Cs"))  # what is a letter differs by version
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(ASSIGNED, max_size=5)).map("".join)


@lru_cache
def merges() -> list[tuple[bytes, bytes]]:
    """The pair that made each token after the single bytes: `merges.txt`, recovered."""
    rank = {token: i for i, token in enumerate(TOKENS)}
    pairs = []
    for token in TOKENS[256:]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(a + b, len(rank)) for a, b in pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        pairs.append(tuple(parts))
    return pairs


def spell(token: bytes) -> str:
    """A token as `vocab.json` writes it: bytes that cannot be seen become U+0100 and up."""
    return token.decode("latin-1").translate(VISIBLE)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' tokenizer of the first n - 1 ranks, from its own two files."""

    @lru_cache
    def make(n: int) -> GPT2TokenizerFast:
        directory = tmp_path_factory.mktemp(f"vocabulary{n}")
        vocab = {spell(token): i for i, token in enumerate(TOKENS[: n - 1])}
        (directory / "vocab.json").write_text(json.dumps(vocab | {END_OF_TEXT: n - 1}))
        lines = [f"{spell(a)} {spell(b)}\n" for a, b in merges()[: n - 257]]
        (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(lines), "utf-8")
        return GPT2TokenizerFast.from_pretrained(directory)

    return make


def check_tokens(text: str, vocab_size: int, theirs) -> None:
    encoding = load_tokenizer(vocab_size)
    ids = encode(encoding, text)
    assert ids.tolist() == theirs(vocab_size).encode(text)
    assert ids.dtype == np.uint16 and all(ids < vocab_size)
    assert encoding.decode(ids.tolist()) == text


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_tokens_are_those_of_transformers(text, vocab_size, theirs):
    check_tokens(text, vocab_size, theirs)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS, vocab_size=st.sampled_from(SIZES))
def test_tokens_of_any_text_are_those_of_transformers(text, vocab_size, theirs):
    check_tokens(text, vocab_size, theirs)


def test_tokens_are_the_published_ones():
    hello, end = encode(load_tokenizer(), "Hello world"), encode(load_tokenizer(), END_OF_TEXT)
    assert (hello.tolist(), end.tolist()) == ([15496, 995], [50256])


@pytest.mark.parametrize("vocab_size", SIZES)
def test_each_id_is_the_token_of_that_rank(vocab_size):
    assert [int(rank) for _, rank in LINES] == list(range(50256))
    encoding = load_tokenizer(vocab_size)
    decoded = [encoding.decode_single_token_bytes(i) for i in range(vocab_size)]
    assert decoded == [*TOKENS[: vocab_size - 1], END_OF_TEXT.encode()]
    assert encoding.n_vocab == vocab_size and encoding.eot_token == vocab_size - 1
    with pytest.raises(KeyError):
        encoding.decode_single_token_bytes(vocab_size)


@pytest.mark.parametrize("vocab_size", [0, 256, 50258])
def test_a_size_that_no_prefix_has_is_refused(vocab_size):
    with pytest.raises(UserError, match=f"^the base's vocab_size is {vocab_size};.*257 to 50257$"):
        load_tokenizer(vocab_size)


def swap_two(content: bytes) -> bytes:
    assert b"\nIHQ= 256\nIGE= 257\n" in content
    return content.replace(b"\nIHQ= 256\nIGE= 257\n", b"\nIHQ= 257\nIGE= 256\n")


DAMAGES = {
    "two ranks swapped": swap_two,
    "last line gone": lambda content: content[: content.rstrip().rindex(b"\n") + 1],
    "a line more": lambda content: content + b"QUJDREVGR0g= 50256\n",
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_ranks_are_refused(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "RANKS", tmp_path / "ranks.tiktoken")
    tokenizer.RANKS.write_bytes(damage(RANKS.read_bytes()))
    with pytest.raises(UserError) as error:
        build(300)
    assert str(error.value).startswith(f"{tokenizer.RANKS}: is damaged")
    assert "\n" not in str(error.value)
    tokenizer.RANKS.write_bytes(RANKS.read_bytes())
    assert build(300).n_vocab == 300


def test_missing_ranks_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "RANKS", tmp_path / "ranks.tiktoken")
    with pytest.raises(UserError, match=r"ranks\.tiktoken: cannot be read \(No such file"):
        build(300)


def test_tiktokens_cache_is_neither_believed_nor_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    poisoned = tmp_path / hashlib.sha1(str(RANKS).encode()).hexdigest()
    poisoned.write_bytes(swap_two(RANKS.read_bytes()))
    assert build(300).encode(" t a") == [256, 257]
    assert list(tmp_path.iterdir()) == [poisoned]
    assert poisoned.read_bytes() == swap_two(RANKS.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(poisoned))  # a file where a directory should be
    assert build(300).encode(" t a") == [256, 257]
