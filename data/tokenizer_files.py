"""Load a base's tokenizer from its files.

Bases on the hub have `tokenizer.json`, or GPT-2's `vocab.json` with `merges.txt`, or BERT's
`vocab.txt`, and beside these a few files that name special tokens.
"""

import filecmp
import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError, first_line
from common.files import brief, open_file, read_json
from data.tokenizer import (
    END_OF_TEXT,
    LibraryTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    byte_of_character,
)

if TYPE_CHECKING:
    import tokenizers

CONFIG = "config.json"
FAST = "tokenizer.json"
VOCAB = "vocab.json"
MERGES = "merges.txt"
WORDS = "vocab.txt"
SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
FILES = (FAST, VOCAB, MERGES, WORDS, SETTINGS, SPECIAL, ADDED, TEMPLATE)
FOREIGN = ("tokenizer.model", "spiece.model")  # SentencePiece's own files
GPT2_FILES = Path(__file__).with_name("gpt2_tokenizer")
GPT2_SIZE = 50257
MINI_FILES = Path(__file__).resolve().parents[1] / "model" / "mini"
EXTRA = "pip install -e '.[hub]'"


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of the base in `directory`, whose config has this `vocab_size`.

    Without tokenizer files, a vocabulary of GPT-2's size gets GPT-2's. Raises UserError, naming the
    file, for one that cannot be read, and for tokens that the model does not have.
    """
    directory = Path(directory)
    path = _main_file(directory, vocab_size)
    try:
        tokenizer = _load_tiktoken(path, vocab_size) or _load_with_library(path, vocab_size)
        for text in tokenizer.special:
            text.encode()  # a lone surrogate, as JSON may hold, is no text
        return tokenizer
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}, or a file beside it, is not what Hugging Face writes: "
            f"{type(error).__name__} {error!s:.80}"
        ) from error


def _main_file(directory: Path, vocab_size: int) -> Path:
    """Return the file that holds the vocabulary. Raises UserError if there is none."""
    if (directory / MERGES).exists() and not (directory / FAST).exists():
        return directory / VOCAB
    for name in (FAST, VOCAB, WORDS):
        if (directory / name).exists():
            return directory / name
    for name in FOREIGN:
        if (directory / name).exists():
            raise UserError(
                f"{directory / name}: is not read; transformers' save_pretrained writes {FAST}"
            )
    if vocab_size == GPT2_SIZE:
        return GPT2_FILES / FAST
    raise UserError(
        f"{directory}: its vocab_size {vocab_size} is not GPT-2's {GPT2_SIZE}, and the base has no "
        f"tokenizer: neither {FAST}, nor {VOCAB} and {MERGES}, nor {WORDS}"
    )


def _contents(directory: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files that are there."""
    contents = {}
    for name in FILES:
        if (directory / name).exists():
            with open_file(directory / name) as file:
                contents[name] = file.read()
    return contents


# GPT-2's own byte-pair encoding


def _load_tiktoken(path: Path, vocab_size: int) -> TiktokenTokenizer | None:
    """Load a tokenizer whose merges are the first of GPT-2's or mini's; return None for others."""
    if path.name == WORDS:
        return None
    stored = read_json(path) if path.name == FAST else _as_tokenizer_json(path)
    merges = [_pair(pair) for pair in (stored.get("model") or {}).get("merges") or []]
    added = _added_tokens(path.parent, stored.get("added_tokens") or [])
    known = _is_ours(path) or _are_known(merges)
    if not (is_gpt2s(stored) and known and _are_plain(path.parent, added)):
        return None

    vocab = stored["model"]["vocab"]
    words = [*byte_of_character(), *(first + second for first, second in merges)]
    ids = tuple(vocab[word] for word in words)
    texts = tuple(_spelt(word) for word in words)

    special = {token["content"]: token["id"] for token in added}
    name = _end_name(path.parent)
    if name and name not in special:
        special[name] = _known_end(path, name, vocab)
    end = special.get(name or END_OF_TEXT)
    if end is None:
        end = _end_by_config(path.parent, special)
    if end is not None:
        special = {END_OF_TEXT: end} | special
    if any(second.startswith(first) for first, second in pairwise(sorted(special))):
        return None  # tiktoken would take either

    _check_ids(path, [*ids, *special.values()], vocab_size)
    return TiktokenTokenizer(
        special, end, vocab_size, path.parent, _contents(path.parent), texts, ids
    )


def _as_tokenizer_json(path: Path) -> dict:
    """Return the content of vocab.json and the files beside it in tokenizer.json's form."""
    vocab = read_json(path)
    added = [{"content": text, "id": i} for text, i in _read(path.parent, ADDED).items()]
    for token in _named_tokens(path.parent, [END_OF_TEXT]):
        if token["content"] in vocab:
            added.append({**token, "id": vocab[token["content"]]})
    with open_file(path.with_name(MERGES)) as file:
        lines = file.read().decode().splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel"},
    }


def _pair(pair: str | list[str]) -> tuple[str, str]:
    """Return a merge's two parts, which are written as "a b" or as ["a", "b"]."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return first, second


def is_gpt2s(stored: dict) -> bool:
    """Return whether a `tokenizer.json` is byte-pair encoding with GPT-2's pattern, and no more."""
    model = stored["model"]
    step = stored.get("pre_tokenizer") or {}
    changes = (
        stored.get("normalizer"),
        model.get("dropout"),
        model.get("continuing_subword_prefix"),
        model.get("end_of_word_suffix"),
        model.get("byte_fallback"),
        model.get("ignore_merges"),
        step.get("add_prefix_space"),
    )
    return (
        model.get("type", "BPE") == "BPE"
        and step.get("type") == "ByteLevel"
        and step.get("use_regex", True)
        and not any(changes)
    )


def _is_ours(path: Path) -> bool:
    """Return whether the file is mini's or GPT-2's `tokenizer.json`, byte for byte: its merges need
    no further check, which takes longer than reading it.
    """
    ours = (MINI_FILES / FAST, GPT2_FILES / FAST)
    return any(filecmp.cmp(path, file, shallow=False) for file in ours)


def _are_known(merges: list[tuple[str, str]]) -> bool:
    """Return whether these are the first merges of mini's tokenizer or of GPT-2's.

    Other merges may tokenize differently: Hugging Face merges only the listed pairs, tiktoken any
    adjacent pair whose concatenation is a token. In these two, every token is made of its own pair.
    """
    for directory in (MINI_FILES, GPT2_FILES):
        known = read_json(directory / FAST)["model"]["merges"][: len(merges)]
        if merges == [_pair(pair) for pair in known]:
            return True
    return False


def _are_plain(directory: Path, added: list[dict]) -> bool:
    """Return whether added tokens leave the white space around them alone, and no space is put
    before a text.
    """
    for token in added:
        strips = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if strips or not token["content"]:
            return False
    return not _read(directory, SETTINGS).get("add_prefix_space")


def _spelt(word: str) -> bytes:
    """Return the bytes that a word of the vocabulary spells."""
    byte_of = byte_of_character()
    return bytes(byte_of[character] for character in word)


# Any other tokenizer


def _load_with_library(path: Path, vocab_size: int) -> LibraryTokenizer:
    """Load a tokenizer of any kind with `tokenizers`, as transformers does."""
    if importlib.util.find_spec("tokenizers") is None:
        raise UserError(f"{path}: needs the library tokenizers; {EXTRA}")
    try:
        engine = _engine(path)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it has no class of its own, and Rust's panics are no Exception
        raise UserError(f"{path}: cannot be read ({first_line(error):.200})") from error
    engine.no_truncation()
    engine.no_padding()
    if getattr(engine.model, "dropout", None):
        engine.model.dropout = None  # it would draw other tokens each time
    _add_tokens(path, engine)

    vocab = engine.get_vocab(with_added_tokens=True)
    special = {added.content: i for i, added in engine.get_added_tokens_decoder().items()}
    name = _end_name(path.parent)
    if name:
        end: int | None = _known_end(path, name, vocab)
    elif END_OF_TEXT in special:
        end = special[END_OF_TEXT]
    else:
        end = _end_by_config(path.parent, special)
        if end is None and path.name == WORDS:
            end = special.get("[SEP]")  # which ends a document in GPT2-Chinese

    end_text = None
    if end is not None:
        end_text = engine.id_to_token(end)
        special.setdefault(END_OF_TEXT, end)

    _check_ids(path, list(vocab.values()), vocab_size)
    contents = _contents(path.parent)
    return LibraryTokenizer(special, end, vocab_size, path.parent, contents, engine, end_text)


def _engine(path: Path) -> "tokenizers.Tokenizer":
    """Build the tokenizer, without the tokens that the files beside `path` add."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    settings = _read(path.parent, SETTINGS)
    prefix = bool(settings.get("add_prefix_space"))
    if path.name == FAST:
        with open_file(path) as file:
            engine = Tokenizer.from_str(file.read().decode())
        if prefix and isinstance(engine.pre_tokenizer, pre_tokenizers.ByteLevel):
            engine.pre_tokenizer.add_prefix_space = True
        return engine

    if path.name == VOCAB:
        stored = _as_tokenizer_json(path)["model"]
        merges = [_pair(pair) for pair in stored["merges"]]
        engine = Tokenizer(models.BPE(stored["vocab"], merges))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        engine.decoder = decoders.ByteLevel()
        return engine

    with open_file(path) as file:
        words = file.read().decode().splitlines()
    vocab = {word: i for i, word in enumerate(words)}
    unknown = _content(settings.get("unk_token") or "[UNK]")
    engine = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    engine.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##")
    return engine


def _add_tokens(path: Path, engine: "tokenizers.Tokenizer") -> None:
    """Add the tokens that the files beside `path` list, and make those special that they name."""
    from tokenizers import AddedToken

    ways = ("single_word", "lstrip", "rstrip", "normalized")
    listed = [{"content": text, "id": i} for text, i in _read(path.parent, ADDED).items()]
    for token in sorted(_added_tokens(path.parent, listed), key=lambda token: token["id"]):
        how = {way: token[way] for way in ways if way in token}
        engine.add_tokens(
            [AddedToken(token["content"], special=token.get("special", False), **how)]
        )
        if engine.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{path}: token {brief(token['content'])} is number "
                f"{engine.token_to_id(token['content'])}, and a file beside it says {token['id']}"
            )

    usual = [END_OF_TEXT]
    if path.name == WORDS:
        usual += ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    added = {token.content for token in engine.get_added_tokens_decoder().values()}
    for token in _named_tokens(path.parent, usual):
        text = token["content"]
        if text not in added and engine.token_to_id(text) is not None:
            engine.add_special_tokens([text])


# What the files beside the vocabulary say


def _read(directory: Path, file: str) -> dict:
    """Read a file, or {} if the base lacks it."""
    if not (directory / file).exists():
        return {}
    return read_json(directory / file)


def _content(token: str | dict) -> str:
    """Return a token's text, which may be a field of a dict."""
    if isinstance(token, dict):
        return token["content"]
    return token


def _added_tokens(directory: Path, added: list[dict]) -> list[dict]:
    """Return the tokens that `tokenizer_config.json` lists, and `added`."""
    decoder = _read(directory, SETTINGS).get("added_tokens_decoder") or {}
    return [*({**token, "id": int(i)} for i, token in decoder.items()), *added]


def _named_tokens(directory: Path, usual: list[str]) -> list[dict]:
    """Return the `usual` tokens, and those to which the base's settings give a role."""
    tokens = [{"content": text} for text in usual]
    settings = _read(directory, SPECIAL) | _read(directory, SETTINGS)
    for field, value in settings.items():
        if not field.endswith(("_token", "_tokens")):
            continue
        values = value if isinstance(value, list) else [value]
        for token in values:
            if isinstance(token, str):
                tokens.append({"content": token})
            elif isinstance(token, dict):  # not a flag, as `add_bos_token` is, nor null
                tokens.append(token)
    return tokens


def _end_name(directory: Path) -> str | None:
    """Return the text of the end-of-text token, if the base's settings name one."""
    name = _read(directory, SETTINGS).get("eos_token") or _read(directory, SPECIAL).get("eos_token")
    if not name:
        return None
    return _content(name)


def _known_end(path: Path, name: str, vocab: dict[str, int]) -> int:
    """Return the id of the end-of-text token. Raises UserError if the vocabulary lacks it."""
    if name not in vocab:
        raise UserError(f"{path}: lacks the base's end-of-text token, {brief(name)}")
    return vocab[name]


def _end_by_config(directory: Path, special: dict[str, int]) -> int | None:
    """Return the token at which transformers ends a generation, if it is a special one."""
    end = _read(directory, CONFIG).get("eos_token_id")
    return end if end in special.values() else None


def _check_ids(path: Path, ids: list[int], vocab_size: int) -> None:
    """Raise UserError for a token that the model does not have."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(
                f"{path}: has token {brief(token)}; config.json's vocab_size is {vocab_size}"
            )
