"""Compares each form of tokenizer files with transformers' reading of it."""

import json
import random
import re
import shutil
import sys
import unicodedata
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

import generate as generate_command
from data.tokenizer import END_OF_TEXT
from data.tokenizer_files import FILES, GPT2_FILES, GPT2_SIZE, load_tokenizer
from model.sampling import generate
from storage.hf_compat import save_tokenizer
from storage.hub import MINI
from storage.weights import load_gpt2, save_gpt2
from tests.helpers import refusal, tiny_gpt2, write_small_tokenizer
from tests.runs import arguments, die, one_line, run, run_acting, scores, stdout_of, story, trained
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


TINY = write(models.BPE(), 300)
UNMERGED = TINY.replace('"ignore_merges":false', '"ignore_merges":true')
PREFIXED = json.dumps(
    {
        "type": "TemplateProcessing",
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    }
)
TRUNCATED = '{"direction":"Right","max_length":9,"strategy":"LongestFirst","stride":0}'


def split_by(pattern: str) -> str:
    """`TINY` with another pattern; what lies between two matches is a word, too."""
    made = Tokenizer.from_str(TINY)
    last = ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = Sequence([Split(Regex(pattern), "isolated"), last])
    return made.to_str()


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FORMS = {  # the model's vocabulary size, and a directory or tokenizer.json
    "GPT-2": (GPT2_SIZE, GPT2_FILES),
    "mini": (8192, MINI),
    "tiny": (300, TINY),
    "special tokens first": (1000, write(models.BPE(), 1000)),
    "padded": (8192, write(models.BPE(), 500, "<pad> <user>")),
    "digits": (300, split_by(r"\p{N}")),
    "Llama 3's pattern": (300, split_by(LLAMA_3)),
    "all merges ignored": (300, UNMERGED),
    "adds <s> to a text": (
        300,
        TINY.replace('"post_processor":null', '"post_processor":' + PREFIXED),
    ),
    "cuts a text": (300, TINY.replace('"truncation":null', f'"truncation":{TRUNCATED}')),
    "a token begins with another": (301, write(models.BPE(), 300, "<s>x")),
    "a token takes spaces": (300, TINY.replace('"lstrip":false', '"lstrip":true')),
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
    if name == "a token takes spaces":
        return
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
    save_tokenizer(load_tokenizer(base, 317), tmp_path, 64)
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


BROKEN = {
    "not JSON": ("{", "not valid JSON"),
    "not a model": (json.dumps({"model": [1]}), "is not what Hugging Face writes: AttributeError"),
    "no model": ("{}", "is not what Hugging Face writes: KeyError"),
    "a pattern": (split_by(r"\p{N}").replace(r"\\p{N}", "("), "cannot be read"),
    "a token too many": (
        write(models.BPE(), 401),
        "has token 400; config.json's vocab_size is 400",
    ),
    "an id that is a text": (re.sub(r'("a":)(\d+)', r'\1"\2"', TINY), "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_tokenizer_is_refused_in_one_line(case, tmp_path):
    content, reason = BROKEN[case]
    (path := tmp_path / "tokenizer.json").write_text(content)
    assert reason in refusal(path, load_tokenizer, tmp_path, 400)


def test_merges_in_any_order_are_followed_as_hugging_face_does(tmp_path):
    """tiktoken would merge any neighbours that spell a token; Hugging Face the listed pairs."""
    draw, path = random.Random(0), tmp_path / "tokenizer.json"
    for _ in range(20):
        merges, words = [], [*"abc"]
        for _ in range(draw.randint(2, 9)):
            merges.append((draw.choice(words), draw.choice(words)))
            words.append("".join(merges[-1]))
        vocab = dict.fromkeys([*LETTERS, *words])
        path.write_text(write(models.BPE({w: i for i, w in enumerate(vocab)}, merges)))
        ours, theirs = load_tokenizer(tmp_path, 300), Tokenizer.from_file(str(path))
        for _ in range(20):
            text = "".join(draw.choices("abc", k=draw.randint(1, 15)))
            assert ours.encode(text).tolist() == theirs.encode(text).ids, (merges, text)


def test_a_file_that_differs_from_gpt2s_in_two_merges_is_not_taken_for_it(tmp_path):
    ours = GPT2_FILES / "tokenizer.json"
    first = '"h e"'
    second = '"e r"'
    content = ours.read_text()
    assert content.count(first) == content.count(second) == 1
    path = tmp_path / "tokenizer.json"
    path.write_text(content.replace(first, "\0").replace(second, first).replace("\0", second))
    shutil.copystat(ours, path)
    assert path.stat().st_size == ours.stat().st_size
    theirs = Tokenizer.from_file(str(path))
    text = "her hers"
    assert load_tokenizer(tmp_path, GPT2_SIZE).encode(text).tolist() == theirs.encode(text).ids
    assert load_tokenizer(GPT2_FILES, GPT2_SIZE).encode(text).tolist() != theirs.encode(text).ids


# Tokenizers that are not byte-level

CHINESE = (
    "你好，世界！灯塔守望着大海。"  # noqa: RUF001
    "The keeper climbs the stair; it's naïve, 1234.\n\n海 上 没有 船。\n"
)
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece(directory: Path, settings: dict, text: str = CHINESE) -> Path:
    """A base's `vocab.txt`, as GPT2-Chinese has it: the text's characters and a few words."""
    characters = sorted({*text.lower(), *text} - {" ", "\n", "灯"})
    words = [*BERT, *characters, *(f"##{c}" for c in characters), "the", "##eeper", "climb"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def unigram(directory: Path, eos: str = "</s>") -> Path:
    """A base's `tokenizer.json`, as transformers makes it of SentencePiece's unigram models."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", eos], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(BOOK.read_text().splitlines()[:2000], trainer)
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return directory


SETTINGS = {
    "lower": {},
    "cased": {"do_lower_case": False},
    "accents": {"do_lower_case": False, "strip_accents": True},
    "words": {"tokenize_chinese_chars": False},
    "eos": {"eos_token": "[CLS]", "tokenizer_class": "BertTokenizer"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_vocab_txt_is_read_as_transformers_reads_it(name, tmp_path):
    directory = wordpiece(tmp_path, SETTINGS[name])
    theirs = transformers.BertTokenizerFast.from_pretrained(directory)
    ours = load_tokenizer(directory, 300)
    for text in (
        CHINESE,
        f"{CHINESE}[SEP]x [MASK]你",
        BOOK.read_text()[:5000],
        MIXED[:5000],
        "",
        " ",
    ):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    end = 2 if name == "eos" else 3  # [SEP] ends a document where none is named
    assert ours.end_of_text == end and ours.encode(f"好{END_OF_TEXT}。")[1] == end


def test_a_wordpiece_token_counts_what_it_is_written_as(tmp_path):
    ours = load_tokenizer(wordpiece(tmp_path, {"do_lower_case": False}), 300)
    ids = ours.encode("你好 keeper climb, 灯海。").tolist()
    assert b"".join(ours.bytes_of[i] for i in ids).decode() == "你好 keeper climb,[UNK]海。"
    assert ours.byte_counts[ids].sum() == len("你好 keeper climb,海。".encode())


def test_a_unigram_base_is_read_as_transformers_reads_it(tmp_path):
    directory = unigram(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours = load_tokenizer(directory, 300)
    book = BOOK.read_text()
    for text in (book, MIXED, "", "  a  b "):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    [line] = [line for line in book.splitlines() if line][:1]
    ids = ours.encode(line).tolist()
    assert b"".join(ours.bytes_of[i] for i in ids).decode() == f" {line}"
    assert ours.byte_counts[ids].sum() == len(line.encode()) + 1
    assert ours.encode(f"a{END_OF_TEXT}")[-1] == ours.end_of_text == 1


def test_tokens_for_single_bytes_are_those_bytes(tmp_path):
    """As in Llama 2: what the vocabulary lacks is spelt byte by byte."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    model = models.BPE(
        {word: i for i, word in enumerate(words)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.save(str(tmp_path / "tokenizer.json"))
    ours, text = load_tokenizer(tmp_path, 300), "a a汉\n"
    ids = ours.encode(text).tolist()
    assert ids == made.encode(text).ids and len(ids) == 6
    assert b"".join(ours.bytes_of[i] for i in ids).decode() == text
    assert ours.byte_counts[ids].sum() == len(text.encode())


@pytest.mark.parametrize("make", [lambda d: wordpiece(d, {}, story()), unigram])
def test_a_base_with_another_kind_of_tokenizer_trains_scores_and_resumes(make, book, tmp_path):
    base = tmp_path / "base"
    tiny_gpt2().save_pretrained(base)
    tokenizer = load_tokenizer(make(base), 317)
    often = ("--batch-size", 4, "--max-steps", 12, "--checkpoint-every", 2, "--lr", 1e-2)
    options = ("full", base, book, tmp_path / "run", *often)
    died = run_acting({5: die}, *arguments(*options))
    assert died.status == 130
    again = trained(*options, "--resume")
    whole = trained("full", base, book, tmp_path / "whole", *often)
    assert again.column("loss") == whole.column("loss")
    assert again.column("val_loss")[-1] < whole.report["base_val_loss"]

    score = scores(tmp_path / "s.json", "--base", whole.out, "--text", book, "--block-size", 16)[0]
    ids = tokenizer.encode(book.read_text())
    assert score["tokens"] == len(ids) - 1
    assert score["bytes"] == tokenizer.byte_counts[ids[1:]].sum()
    assert 0.95 < score["bytes"] / len(book.read_bytes()) < 1.05
    said = stdout_of(
        *(generate_command.main, "--base", whole.out, "--device", "cpu"),
        *("--prompt", "The lamp", "--max-new-tokens", 5),
    )
    assert said.startswith("The lamp")


def test_the_files_are_saved_though_the_base_has_gone(tmp_path):
    """A run may take days, and its base may be on a disk that is unplugged."""
    for make in (unigram, lambda d: wordpiece(d, {}), lambda d: shutil.copytree(MINI, d)):
        base, out = tmp_path / "base", tmp_path / "out"
        make(base)
        names = {path.name for path in base.iterdir()} & {*FILES}
        files = {name: (base / name).read_bytes() for name in names}
        tokenizer = load_tokenizer(base, 8192)
        shutil.rmtree(base)
        out.mkdir()
        save_tokenizer(tokenizer, out, 256)
        written = {path.name: path.read_bytes() for path in out.iterdir()}
        own = json.loads(files.pop("tokenizer_config.json", "{}"))
        settings = json.loads(written.pop("tokenizer_config.json"))
        assert settings.items() >= own.items() and settings["model_max_length"] == 256
        assert written == files
        assert load_tokenizer(out, 8192).sha256 == tokenizer.sha256
        shutil.rmtree(out)


def test_a_full_run_writes_the_tokenizer_though_its_base_has_gone(base, book, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    gone = {1: lambda trainer: shutil.rmtree(copy)}
    argv = arguments("full", copy, book, tmp_path / "out", "--max-steps", 2)
    assert run_acting(gone, *argv).status == 0 and not copy.exists()
    name = "tokenizer.json"
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = wordpiece(tmp_path / "base", {}) / "vocab.txt"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "tokenizers", None)
        missing = "needs the library tokenizers; pip install -e '.[hub]'"
        assert missing in refusal(path, load_tokenizer, path.parent, 300)
        assert load_tokenizer(MINI, 8192).encode("The sea").size == 2


def test_a_million_blanks_are_refused_in_one_line(base):
    gpt2 = load_tokenizer(GPT2_FILES, GPT2_SIZE)
    assert gpt2.encode(f"a{' ' * 131_000}b").size > 1000  # the longest piece of a book
    for blank in " \n":
        prompt = f"a{blank * 1_000_000}b"
        ending = run(generate_command.main, "--base", base, "--device", "cpu", "--prompt", prompt)
        assert "1,000,000 blanks in a row is not read" in one_line(ending, 2)


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


def test_vocab_and_merges_of_a_base_of_its_own(tmp_path):
    """Neither GPT-2's merges nor mini's; as a base that was trained from scratch in 2020."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    how = {"special_tokens": [END_OF_TEXT], "initial_alphabet": LETTERS}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **how)
    made.train_from_iterator([MIXED, CHINESE * 50], trainer)
    made.model.save(str(tmp_path))
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, 400)
    for text in (BOOK.read_text(), MIXED, f"a{END_OF_TEXT}\nb"):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    assert ours.end_of_text == theirs.eos_token_id == 0


def test_without_files_it_is_gpt2s(tmp_path):
    assert "300 is not GPT-2's 50257, " in refusal(tmp_path, load_tokenizer, tmp_path, 300)
    whole = load_tokenizer(tmp_path, 50257)
    assert whole.encode(f"Hello world{END_OF_TEXT}").tolist() == [15496, 995, 50256]
    ranks = (b64encode(whole.bytes_of[i]) + b" %d\n" % i for i in range(50256))
    assert sha256(b"".join(ranks)).hexdigest() == PUBLISHED
    for name in ("spiece.model", "tokenizer.model"):
        (other := tmp_path / name).touch()
        assert "writes tokenizer.json" in refusal(other, load_tokenizer, tmp_path, 50257)
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


def test_a_special_token_that_is_no_text_is_refused(tmp_path):
    write_small_tokenizer(tmp_path, 300)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "content": "\ud800", "id": 298})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert "is not what Hugging Face writes" in refusal(
        tmp_path / "tokenizer.json", load_tokenizer, tmp_path, 300
    )
