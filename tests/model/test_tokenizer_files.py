"""Compares each form of tokenizer files with transformers' reading of it; refuses other kinds."""

import json
import random
import re
import unicodedata
from base64 import b64encode
from hashlib import sha256

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from common.errors import UserError
from model.hub import MINI
from model.sampling import generate
from model.tokenizer import END_OF_TEXT
from model.tokenizer_files import GPT2_FILES, GPT2_SIZE, load_tokenizer, save_tokenizer
from model.weights import load_gpt2, save_gpt2
from tests.helpers import refusal
from training.options import BOOK

ASSIGNED = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cn", "Cs")]
MIXED = "".join(random.Random(0).choices(ASSIGNED + 4000 * [" ", "\n", "'s", "a", "1"], k=65_000))
PARTS = [
    *" \n\t1é汉😀\x1c\x85\u200d",
    "  ",
    "'s",
    " The",
    END_OF_TEXT,
    "<|endof",
    "</s>",
    "<user>",
    "<|im_end|>",
]
TEXTS = st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=5)
LETTERS = sorted(ByteLevel.alphabet())
# Of OpenAI's r50k_base.tiktoken, which has a token's bytes and its rank on each line.
PUBLISHED = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
BOTH = [(a, b) for a in LETTERS for b in LETTERS]
WORDS = {w: i for i, w in enumerate([END_OF_TEXT, *map("".join, BOTH), *LETTERS])}  # 65,793


def write(model: models.Model, train: int = 0, added: str = "") -> str:
    """A `tokenizer.json`, byte-level; trained on the bundled book, special tokens come first."""
    made = Tokenizer(model)
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if train:
        how = {"special_tokens": ["<s>", "</s>", END_OF_TEXT], "initial_alphabet": LETTERS}
        made.train([str(BOOK)], trainers.BpeTrainer(vocab_size=train, show_progress=False, **how))
    made.add_tokens(added.split())
    return made.to_str()


CHARACTERS, TINY = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), write(models.BPE(), 300)
UNMERGED = TINY.replace('"ignore_merges":false', '"ignore_merges":true')
PREFIXED = json.dumps(
    {
        "type": "TemplateProcessing",
        "pair": [],
        "special_tokens": {},
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    }
)
DIGITS = Tokenizer.from_str(TINY)  # what lies between two digits is a word, too
SPLIT = [Split(Regex(r"\p{N}"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
DIGITS.pre_tokenizer = Sequence(SPLIT)
LLAMA_3 = Tokenizer.from_str(TINY)
LLAMA_3.pre_tokenizer = Sequence(
    [
        Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
                r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        SPLIT[1],
    ]
)
FORMS = {  # the model's vocabulary size, and a directory or tokenizer.json
    "GPT-2": (GPT2_SIZE, GPT2_FILES),
    "mini": (8192, MINI),
    "tiny": (300, TINY),
    "special tokens first": (1000, write(models.BPE(), 1000)),
    "padded": (8192, write(models.BPE(), 500, "<pad> <user>")),
    "digits": (300, DIGITS.to_str()),
    "Llama 3's pattern": (300, LLAMA_3.to_str()),
    "uint32": (65793, write(models.BPE(WORDS, BOTH), added=END_OF_TEXT)),
}
NAMES = [*FORMS, "vocab and merges"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict:
    """Our tokenizer and transformers' of each form."""
    place, fast, both = tmp_path_factory.mktemp("bases"), transformers.PreTrainedTokenizerFast, {}
    for name, (size, directory) in FORMS.items():
        if isinstance(directory, str):
            content, directory = directory, place / name
            directory.mkdir()
            (directory / "tokenizer.json").write_text(content)
        both[name] = load_tokenizer(directory, size), fast.from_pretrained(directory)
    Tokenizer.from_file(str(MINI / "tokenizer.json")).model.save(str(place))
    (place / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {
                    "8192": {
                        "content": "<|im_end|>",
                        "lstrip": False,
                        "normalized": False,
                        "rstrip": False,
                        "single_word": False,
                        "special": True,
                    }
                },
            }
        )
    )
    (place / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": [END_OF_TEXT], "pad_token": None})
    )
    theirs = transformers.GPT2Tokenizer.from_pretrained(place)
    ours = load_tokenizer(place, 8193)
    assert ours.end_of_text == theirs.eos_token_id == 8192
    return both | {"vocab and merges": (ours, theirs)}


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.sampled_from(PARTS) | TEXTS), name=st.sampled_from(NAMES))
def test_tokens_of_any_text_are_those_of_transformers(parts, name, pairs):
    (ours, theirs), text = pairs[name], "".join(parts)
    ids = ours.encode(text)
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
    assert b"".join(ours.bytes_of[i] for i in ids.tolist()) == text.encode()
    ends = sum(len(ours.bytes_of[i]) for i in ids.tolist() if i == ours.end_of_text)
    assert ours.byte_counts[ids].sum() == len(text.encode()) - ends


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_book_and_of_mixed_unicode_are_those_of_transformers(name, pairs):
    ours, theirs = pairs[name]
    for text in (BOOK.read_text(), MIXED):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    (last,), wide = ours.encode("a"), name == "uint32"
    assert last.dtype == (np.uint32 if wide else np.uint16) and (last > 65_535) == wide
    end = "<|im_end|>" if name == "vocab and merges" else END_OF_TEXT
    assert ours.encode(end).tolist() == [ours.end_of_text]


def test_stock_transformers_loads_mini_and_what_a_full_run_leaves(base, tmp_path):
    save_gpt2(load_gpt2(base), tmp_path, end_of_text=316)
    save_tokenizer(load_tokenizer(base, 317), tmp_path)
    for directory in (tmp_path, MINI):
        stock = transformers.pipeline(  # it has what AutoModelForCausalLM and AutoTokenizer load
            "text-generation", str(directory), device="cpu", dtype=torch.float32
        )
        ours = load_gpt2(directory)
        tokenizer = load_tokenizer(directory, ours.config.vocab_size)
        ids = tokenizer.encode(BOOK.read_text())
        assert stock.tokenizer.encode(BOOK.read_text()) == ids.tolist()
        assert stock.tokenizer.eos_token_id == tokenizer.end_of_text
        batch = torch.from_numpy(ids[:60].astype(int))[None]
        torch.testing.assert_close(ours(batch), stock.model(batch).logits, rtol=1e-4, atol=1e-4)
        text = stock("The sea", max_new_tokens=8, do_sample=False)[0]["generated_text"]
        prompt = torch.from_numpy(tokenizer.encode(text[:7]).astype(int))
        drawn = b"".join(map(tokenizer.bytes_of.get, generate(ours, prompt, 8, temperature=0)))
        assert text[7:] == drawn.decode(errors="replace")


@pytest.mark.parametrize(
    "content, reason",
    [
        (
            Tokenizer(models.WordPiece({"a": 0}, unk_token="a")).to_str(),
            "is a 'WordPiece' tokenizer",
        ),
        (Tokenizer(models.Unigram([("a", 0.0)])).to_str(), "is a 'Unigram' tokenizer"),
        (Tokenizer(CHARACTERS).to_str(), "pre_tokenizer"),
        (write(CHARACTERS), "is not byte-level BPE"),
        (
            TINY.replace('"normalizer":null', '"normalizer":{"type":"NFC"}'),
            "normalizer {'type': 'NFC",
        ),
        (TINY.replace('"add_prefix_space":false', '"add_prefix_space":true'), "pre_tokenizer"),
        (TINY.replace('"use_regex":true', '"use_regex":false'), "pre_tokenizer"),
        (DIGITS.to_str().replace('"Isolated"', '"Removed"'), "pre_tokenizer"),
        (DIGITS.to_str().replace(r"\\p{N}", "(?<=[a-z])(?=[A-Z])"), "pre_tokenizer"),
        (DIGITS.to_str().replace(r"\\p{N}", r"\\s*\\p{L}*"), "pre_tokenizer"),
        (UNMERGED.replace('"vocab":{', '"vocab":{"zqzq":299,'), "makes token 'zqzq'"),
        (
            write(
                models.BPE(
                    {w: i for i, w in enumerate([*LETTERS, "ab", "bc", "abc"])},
                    [("a", "b"), ("b", "c"), ("a", "bc")],
                )
            ),
            "no merge makes token 'abc'",
        ),
        (TINY.replace('"post_processor":null', '"post_processor":' + PREFIXED), "adds tokens"),
        (TINY.replace('"dropout":null', '"dropout":0.1'), "dropout 0.1 is not supported"),
        (TINY.replace('"byte_fallback":false', '"byte_fallback":true'), "byte_fallback True"),
        (TINY.replace('"lstrip":false', '"lstrip":true'), "'<s>' strips"),
        ("{", "not valid JSON"),
        (DIGITS.to_str().replace(r"\\p{N}", "("), "pattern is not supported"),
        (write(models.BPE(), 300, "<s>x"), "'<s>x' begins with another"),
        (write(models.BPE(), 401), "has token 400; config.json's vocab_size is 400"),
        (json.dumps({"model": [1]}), "is not what Hugging Face writes: AttributeError"),
        (re.sub(r'("a":)(\d+)', r'\1"\2"', TINY), "has token '"),
        (TINY.replace('"content":"<s>"', '"content":""'), "has no text"),
        *(
            (DIGITS.to_str().replace(r"\\p{N}", part), "pre_tokenizer")
            for part in (r"\\w+", "[[:alpha:]]", "^a", r"(a)\\1")
        ),
    ],
)
def test_other_tokenizers_are_refused_in_one_line(content, reason, tmp_path):
    (path := tmp_path / "tokenizer.json").write_text(content)
    assert reason in refusal(path, load_tokenizer, tmp_path, 400)


def test_ignored_merges_that_make_every_token_change_nothing(tmp_path):
    (tmp_path / "tokenizer.json").write_text(UNMERGED)
    ours, theirs = (
        load_tokenizer(tmp_path, 300),
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    assert ours.encode(BOOK.read_text()).tolist() == theirs.encode(BOOK.read_text()).ids


def test_merges_that_another_order_breaks_are_refused_and_others_followed(tmp_path):
    """tiktoken merges neighbours that spell a token; Hugging Face the listed pairs alone."""
    draw, path, accepted = random.Random(0), tmp_path / "tokenizer.json", 0
    for _ in range(200):
        merges, words = [], [*"abc"]
        for _ in range(draw.randint(2, 9)):
            merges.append((draw.choice(words), draw.choice(words)))
            words += ["".join(merges[-1])]
        vocab = dict.fromkeys([*LETTERS, *words])
        path.write_text(write(models.BPE({w: i for i, w in enumerate(vocab)}, merges)))
        try:
            ours = load_tokenizer(tmp_path, 300)
        except UserError as error:
            assert "no merge makes token" in str(error)
            continue
        accepted, theirs = accepted + 1, Tokenizer.from_file(str(path))
        for _ in range(50):
            text = "".join(draw.choices("abc", k=draw.randint(1, 15)))
            assert ours.encode(text).tolist() == theirs.encode(text).ids, (merges, text)
    assert 20 < accepted < 180


def test_vocab_and_merges_alone_are_enough(tmp_path):
    """The hub's first GPT-2 had no other file: the end of text is known by its name."""
    model, whole = (
        json.loads((MINI / "tokenizer.json").read_text())["model"],
        load_tokenizer(MINI, 8192),
    )
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    alone, text = load_tokenizer(tmp_path, 8192), f"The sea.{END_OF_TEXT}It  turned."
    assert alone.encode(text).tolist() == whole.encode(text).tolist()
    assert alone.end_of_text == whole.end_of_text == 8191
    [word] = whole.encode(" the").tolist()
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "Ġthe", "add_bos_token": true}')
    named = load_tokenizer(tmp_path, 8192)
    assert named.special == {END_OF_TEXT: 8191, "Ġthe": word}


def test_without_files_it_is_gpt2s(tmp_path):
    assert "300 is not GPT-2's 50257, " in refusal(tmp_path, load_tokenizer, tmp_path, 300)
    whole = load_tokenizer(tmp_path, 50257)
    assert whole.encode(f"Hello world{END_OF_TEXT}").tolist() == [15496, 995, 50256]
    ranks = (b64encode(whole.bytes_of[i]) + b" %d\n" % i for i in range(50256))
    assert sha256(b"".join(ranks)).hexdigest() == PUBLISHED
    for name in ("vocab.txt", "spiece.model", "tokenizer.model"):
        (other := tmp_path / name).touch()
        assert "is not byte-level BPE" in refusal(other, load_tokenizer, tmp_path, 50257)
        other.unlink()
    (tmp_path / "vocab.json").write_text("{}")  # alone it is not taken for GPT-2's
    merges = tmp_path / "merges.txt"
    assert "cannot be read" in refusal(merges, load_tokenizer, tmp_path, 50257)
    merges.write_text("#version: 0.2\na b\nab\n")
    assert "not what Hugging Face writes" in refusal(tmp_path, load_tokenizer, tmp_path, 300)


def test_the_end_of_text_is_what_the_base_calls_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TINY.replace(END_OF_TEXT, "<end>"))
    (config := tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path, 300).encode(f"</s>{END_OF_TEXT}").tolist() == [1, 1]
    config.unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(tmp_path, 300).encode(END_OF_TEXT).tolist() == [1]
    config.write_text('{"eos_token": "a"}')  # an entry of the vocabulary, and no added token
    assert load_tokenizer(tmp_path, 300).end_of_text == json.loads(TINY)["model"]["vocab"]["a"]
    config.write_text('{"eos_token": "<|im_end|>"}')
    reason = refusal(tmp_path, load_tokenizer, tmp_path, 300)
    assert "lacks the base's end-of-text token, '<|im_end|>'" in reason
    config.write_text('{"add_prefix_space": true}')
    assert "add_prefix_space is not" in refusal(config, load_tokenizer, tmp_path, 300)
