"""Compare tokenizers with transformers on the same files, and count a text's bytes."""

import json
import shutil
import sys
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from data.tokenizer import (
    END_OF_TEXT,
    FAST,
    FOREIGN,
    GPT2_FILES,
    GPT2_SIZE,
    MERGES,
    SETTINGS,
    SPECIAL,
    VOCAB,
    load_tokenizer,
)
from generate import StreamDecoder
from storage.hf_compat import save_tokenizer
from storage.hub import MINI
from storage.weights import CONFIG, base_hashes
from tests.helpers import refusal, write_small_tokenizer
from training.options import BOOK

PARTS = ["[SEP]", *" \n\t1é汉😀\x1c\x85\u200d", "  ", "'s", " The", END_OF_TEXT, "<|endof", "</s>"]
TEXTS = st.lists(
    st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=5)
).map("".join)
LETTERS = sorted(ByteLevel.alphabet())
# Lines of OpenAI's r50k_base.tiktoken, each with a token's bytes and rank.
PUBLISHED = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def byte_level() -> Tokenizer:
    """Train byte-level BPE on the book, with special tokens first and tokens added later."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    first = ["<s>", "</s>", END_OF_TEXT]
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=first, initial_alphabet=LETTERS, show_progress=False
    )
    made.train([str(BOOK)], trainer)
    made.add_tokens(["<pad>", "<user>"])
    made.enable_truncation(9)  # some bases store a truncation, which transformers ignores
    made.enable_padding()
    return made


def bert() -> Tokenizer:
    """Make a WordPiece tokenizer of lower case. It drops white space and unknown words."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'", *"你好世界海"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), "the"]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(words[:4])
    return made


def write(directory: Path, made: Tokenizer, eos: str | None = None) -> Path:
    """Write a base's tokenizer.json and, if it has an end-of-text token, its settings."""
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / FAST))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (directory / SETTINGS).write_text(json.dumps(fields))
    return directory


def write_pair(directory: Path) -> Path:
    """Write mini's tokenizer only as vocab.json and merges.txt, as in the hub's first GPT-2."""
    directory.mkdir()
    Tokenizer.from_file(str(MINI / FAST)).model.save(str(directory))
    return directory


NAMES = ["GPT-2", "mini", "byte-level", "bert", "vocab and merges"]
TIKTOKEN = NAMES[:2]
BYTE_LEVEL = ["GPT-2", "mini", "byte-level", "vocab and merges"]  # these keep every character


@cache
def pair(name: str):
    """Return our tokenizer and transformers' tokenizer for one kind of files."""
    with TemporaryDirectory() as place:
        makers = {
            "GPT-2": lambda: GPT2_FILES,
            "mini": lambda: MINI,
            "byte-level": lambda: write(Path(place), byte_level(), END_OF_TEXT),
            "bert": lambda: write(Path(place), bert(), "[SEP]"),
            "vocab and merges": lambda: write_pair(Path(place, "pair")),
        }
        directory = makers[name]()
        stock = transformers.GPT2Tokenizer if name == "vocab and merges" else AutoTokenizer
        return load_tokenizer(directory, GPT2_SIZE), stock.from_pretrained(directory)


def covered(theirs, text: str) -> list[int]:
    """Return the bytes that each token covers, from the token's end in transformers' reading."""
    encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = []
    before = 0
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        reached = max(before, len(text[:end].encode()))
        counts.append(0 if token == theirs.eos_token_id else reached - before)
        before = reached
    return counts


@settings(deadline=None, max_examples=70)
@given(text=TEXTS, name=st.sampled_from(NAMES))
def test_tokens_and_bytes_of_any_text_are_those_of_transformers(text, name):
    ours, theirs = pair(name)
    ids, byte_counts = ours.encode_with_bytes(text)
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
    assert ids.dtype == np.uint16
    if name in TIKTOKEN:  # here each byte counts for the token that contains it
        sizes = [len(ours.engine.decode_single_token_bytes(token)) for token in ids.tolist()]
        sizes = np.where(ids == ours.end_of_text, 0, sizes).tolist()
        assert byte_counts.tolist() == sizes
    elif name in BYTE_LEVEL:
        assert byte_counts.tolist() == covered(theirs, text)
    if name in BYTE_LEVEL:
        assert ours.decode(ids) == text
    ends = ids == ours.end_of_text
    if not ends.all():  # every byte of the text is counted once
        assert byte_counts.sum() == len(text.encode()) - ends.sum() * len(ours.eos_token)
    assert not byte_counts[ends].any()


@settings(deadline=None, max_examples=50)
@given(text=TEXTS, name=st.sampled_from(NAMES), prompt=st.sampled_from(["", "The sea", "汉 "]))
def test_a_stream_of_tokens_is_the_text_in_whole_characters(text, name, prompt):
    ours, _ = pair(name)
    before = ours.encode(prompt).tolist()
    ids = ours.encode(prompt + text).tolist()
    if ids[: len(before)] != before:
        return
    decoder = StreamDecoder(ours, before)
    pieces = [decoder.add(token) for token in ids[len(before) :]]
    assert "�" in text or not any("�" in piece for piece in pieces)
    whole = ours.decode(before) + "".join(pieces) + decoder.finish()
    assert whole == ours.decode(ids)


def test_without_files_it_is_gpt2s(tmp_path):
    assert "300 is not GPT-2's 50257, " in refusal(tmp_path, load_tokenizer, tmp_path, 300)
    whole = load_tokenizer(tmp_path, GPT2_SIZE)
    assert whole.encode(f"Hello world{END_OF_TEXT}").tolist() == [15496, 995, 50256]
    ranks = (whole.engine.decode_single_token_bytes(i) for i in range(50256))
    lines = (b64encode(rank) + b" %d\n" % i for i, rank in enumerate(ranks))
    assert sha256(b"".join(lines)).hexdigest() == PUBLISHED


def test_other_files_are_refused_with_the_conversion(tmp_path):
    other = tmp_path / FOREIGN[0]
    other.touch()
    reason = refusal(other, load_tokenizer, tmp_path, GPT2_SIZE)
    assert "AutoTokenizer, and write tokenizer.json with save_pretrained" in reason
    both = write_pair(tmp_path / "pair")
    (added := both / "added_tokens.json").write_text('{"<user>": 8192}')
    assert "AutoTokenizer" in refusal(added, load_tokenizer, both, 8193)
    write(both, byte_level())  # not read if there is a tokenizer.json
    assert load_tokenizer(both, 502).end_of_text == 2


def test_a_file_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    path = tmp_path / FAST
    path.write_bytes(b'{"model": [1]}')
    assert "cannot be read" in refusal(path, load_tokenizer, tmp_path, 400)
    byte_level().save(str(path))
    reason = refusal(path, load_tokenizer, tmp_path, 501)
    assert reason == "has token 501; config.json's vocab_size is 501"


def test_the_end_of_text_is_what_the_base_calls_it(tmp_path):
    byte_level().save(str(tmp_path / FAST))
    assert load_tokenizer(tmp_path, 502).end_of_text == 2
    (tmp_path / SPECIAL).write_text('{"eos_token": "<s>"}')
    assert load_tokenizer(tmp_path, 502).encode(f"<s>{END_OF_TEXT}").tolist() == [0, 2]
    assert load_tokenizer(tmp_path, 502).end_of_text == 0
    (tmp_path / SETTINGS).write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path, 502).end_of_text == 1
    (tmp_path / SETTINGS).write_text('{"eos_token": "<|im_end|>"}')
    reason = refusal(tmp_path / SETTINGS, load_tokenizer, tmp_path, 502)
    assert "eos_token '<|im_end|>' is not in the vocabulary" in reason
    (tmp_path / SETTINGS).write_text('{"eos_token": "</s>"}')
    (tmp_path / SPECIAL).write_text("{")  # a trained model could not be saved
    assert "not valid JSON" in refusal(tmp_path / SPECIAL, load_tokenizer, tmp_path, 502)


def test_each_file_of_a_pair_identifies_the_base(tmp_path):
    """A resumed run must not go on with other tokens."""
    base = write_pair(tmp_path / "base")
    (base / CONFIG).touch()
    before = base_hashes(base)
    for file in (VOCAB, MERGES):
        content = (base / file).read_text()
        (base / file).write_text(f"{content}\n")
        assert base_hashes(base) != before
        (base / file).write_text(content)
    assert base_hashes(base) == before


@pytest.mark.parametrize("make", [lambda path: write(path, bert(), "[SEP]"), write_pair])
def test_the_files_are_saved_though_the_base_has_gone(tmp_path, make):
    """A run may take days, and the base's disk may be unplugged meanwhile."""
    base = make(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    tokenizer = load_tokenizer(base, 8192)
    shutil.rmtree(base)
    out = tmp_path / "out"
    out.mkdir()
    save_tokenizer(tokenizer, out, 256)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    stored = json.loads(written.pop(SETTINGS))
    assert stored.items() >= json.loads(files.pop(SETTINGS, "{}")).items()
    assert stored["model_max_length"] == 256 and stored["pad_token"] == tokenizer.eos_token
    assert written == files
    assert load_tokenizer(out, 8192).vocabulary == tokenizer.vocabulary


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    write_small_tokenizer(tmp_path, 317)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    missing = "needs the library tokenizers; pip install -e '.[hub]'"
    assert missing in refusal(tmp_path / FAST, load_tokenizer, tmp_path, 317)
    assert load_tokenizer(MINI, 8192).encode("The sea").size == 2
