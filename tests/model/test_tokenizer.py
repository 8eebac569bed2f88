"""GPT-2's own tokenizer, from the bundled ranks: `test_tokenizer_files.py` has any other."""

import pytest

from common.errors import UserError
from model import tokenizer
from model.tokenizer import END_OF_TEXT, RANKS, gpt2_tokenizer

build = gpt2_tokenizer.__wrapped__  # without its memory of earlier calls


def test_tokens_are_the_published_ones():
    whole = gpt2_tokenizer()
    assert whole.encode(f"Hello world{END_OF_TEXT}").tolist() == [15496, 995, 50256]
    assert (whole.end_of_text, len(whole.bytes_of)) == (50256, 50257)
    assert b"".join(whole.bytes_of[i] for i in (15496, 995)) == b"Hello world"
    assert whole.byte_counts[[15496, 995, 50256]].tolist() == [5, 6, len(END_OF_TEXT)]


@pytest.mark.parametrize("content", [None, b"", RANKS.read_bytes()[:-9],
                                     RANKS.read_bytes().replace(b" 300\n", b" 301\n"),
                                     RANKS.read_bytes() + b"QUJDREVGR0g= 50256\n"],
                         ids=("missing", "empty", "cut", "changed", "longer"))
def test_damaged_and_missing_ranks_are_refused(tmp_path, monkeypatch, content):
    path = tmp_path / "ranks"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(tokenizer, "RANKS", path)
    with pytest.raises(UserError) as refused:
        build()
    assert str(refused.value).startswith(str(path)) and len(str(refused.value).splitlines()) == 1
