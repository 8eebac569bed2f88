"""Read a base's tokenizer in Hugging Face's two formats: `tokenizer.json`, or `vocab.json` with
`merges.txt`.

Both spell bytes as printable characters (Radford et al. 2019; `bytes_to_unicode` in OpenAI's gpt-2
encoder.py) and list the merges in order, which is the order of tiktoken's ranks.
"""

import re
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

from common.errors import UserError
from common.files import atomic_path, brief, open_file, read_json
from model.tokenizer import END_OF_TEXT, PATTERN, Tokenizer, rank_tokens
from model.weights import CONFIG

FAST, VOCAB, MERGES, SETTINGS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
)
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
GPT2_FILES, GPT2_SIZE = Path(__file__).with_name("gpt2_tokenizer"), 50257
FOREIGN = ("tokenizer.model", "spiece.model", "vocab.txt")  # SentencePiece's and WordPiece's
FILES = (FAST, VOCAB, MERGES, SETTINGS, SPECIAL, ADDED)
# Parts of regular expressions that tiktoken and Hugging Face (Oniguruma) read differently.
DIFFERENT, ANCHOR = re.compile(r"\\[wWbBhH1-9]|\[:|\(\?[a-z]*m"), re.compile(r"(?<!\\)[\^$]")
CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")  # the ^ of [^a] is not an anchor
PROPERTY = re.compile(r"\\[pP]\{\^?\w+\}")
PROBE = "aAa1a .\n\n A1'A"  # characters of several kinds side by side, to match between


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of the base in `directory`, whose config has this `vocab_size`.

    Without tokenizer files, a vocabulary of GPT-2's size gets GPT-2's. Raises UserError, naming the
    file, for anything but byte-level BPE, and for tokens that the model does not have.
    """
    directory = Path(directory)
    if (path := directory / FAST).exists():
        read = read_json
    elif (path := directory / VOCAB).exists() or (directory / MERGES).exists():
        read = _read_vocab_and_merges
    elif foreign := next(filter(Path.exists, map(directory.joinpath, FOREIGN)), None):
        raise UserError(f"{foreign}: is not byte-level BPE, and only that is known")
    elif vocab_size == GPT2_SIZE:
        read, path = read_json, GPT2_FILES / FAST
    else:
        raise UserError(
            f"{directory}: its vocab_size {vocab_size} is not GPT-2's {GPT2_SIZE}, and "
            f"the base has no tokenizer: neither {FAST}, nor {VOCAB} and {MERGES}"
        )
    try:
        return _byte_level(path, read(path), vocab_size)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}, or a file beside it, is not what Hugging Face writes: "
            f"{type(error).__name__} {error!s:.80}"
        ) from error


def _read_vocab_and_merges(path: Path) -> dict:
    """Return the content of vocab.json and the files beside it in `tokenizer.json`'s form."""
    vocab, directory = read_json(path), path.parent
    with open_file(directory / MERGES) as file:
        lines = file.read().decode().splitlines()
    added = [{"content": text, "id": i} for text, i in _read(directory, ADDED).items()]
    named: list = [END_OF_TEXT]
    for field, value in (_read(directory, SPECIAL) | _read(directory, SETTINGS)).items():
        if field.endswith(("_token", "_tokens")):  # one or several, each a text or a dict
            named += value if isinstance(value, list) else [value]
    for token in named:
        token = token if isinstance(token, dict) else {"content": token}
        if token["content"] in vocab:
            added.append({**token, "id": vocab[token["content"]]})
    merges = [line for line in lines if line and not line.startswith("#version")]
    return {
        "model": {"vocab": vocab, "merges": merges},
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel"},
    }


def _byte_level(path: Path, stored: dict, vocab_size: int) -> Tokenizer:
    """Build the tokenizer, turning characters into the bytes they spell; bytes rank first."""
    model = stored.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise UserError(
            f"{path}: is a {brief(model.get('type'))} tokenizer; only byte-level BPE is known"
        )
    for field in (
        "normalizer",
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
    ):
        if value := (stored | model).get(field):
            raise UserError(f"{path}: {field} {brief(value)} is not supported")
    after = stored.get("post_processor") or {}
    for step in after.get("processors") or [after]:
        if step.get("cls") or "SpecialToken" in str(step.get("single")):
            raise UserError(
                f"{path}: post_processor {brief(step)} adds tokens to each text, which "
                "is not supported"
            )
    pattern, vocab = _pattern(path, stored.get("pre_tokenizer") or {}), model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    byte_of = {character: byte for byte, character in enumerate(_characters())}
    words = [*_characters(), *rank_tokens(merges)]
    try:
        ids = tuple(vocab[word] for word in words)
        texts = tuple(bytes(byte_of[character] for character in word) for word in words)
    except KeyError as error:
        raise UserError(
            f"{path}: is not byte-level BPE: its vocabulary lacks {error!s:.80}"
        ) from error
    special, end = _special(path, stored.get("added_tokens") or [], vocab)
    named = {first + second for first, second in merges}
    if model.get("ignore_merges"):
        named |= vocab.keys() - special.keys()
    if unmade := named - {*words}:
        raise UserError(
            f"{path}: no merge makes token {brief(min(unmade))} of its own characters, "
            "which is not supported"
        )
    for token in (*ids, *special.values()):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(
                f"{path}: has token {brief(token)}; config.json's vocab_size is {vocab_size}"
            )
    tokenizer = Tokenizer(pattern, texts, ids, special, end, vocab_size, path.parent)
    try:
        tokenizer.encode("")
    except ValueError as error:
        raise UserError(f"{path}: pre_tokenizer's pattern is not supported ({error})") from error
    return tokenizer


def _special(
    path: Path, added: list[dict], vocab: dict[str, int]
) -> tuple[dict[str, int], int | None]:
    """Return the ids of tokens that are never split, and that of the end of text (None: none)."""
    settings = _read(path.parent, SETTINGS)
    if settings.get("add_prefix_space"):
        raise UserError(f"{path.parent / SETTINGS}: add_prefix_space is not supported")
    decoder = settings.get("added_tokens_decoder") or {}
    special = {}
    for token in [*({**decoder[i], "id": int(i)} for i in decoder), *added]:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(
                f"{path}: token {brief(token['content'])} strips or needs white space "
                "around it, which is not supported"
            )
        if not token["content"]:
            raise UserError(f"{path}: token {brief(token['id'])} has no text")
        special[token["content"]] = token["id"]
    name = settings.get("eos_token") or _read(path.parent, SPECIAL).get("eos_token")
    name = name["content"] if isinstance(name, dict) else name
    if name and name not in special:
        if name not in vocab:
            raise UserError(f"{path}: lacks the base's end-of-text token, {brief(name)}")
        special[name] = vocab[name]
    end = special.get(name or END_OF_TEXT)
    if end is None:  # AutoTokenizer knows of none then, but generation ends at this one
        eos = _read(path.parent, CONFIG).get("eos_token_id")
        end = eos if eos in special.values() else None
    if end is not None:
        special = {END_OF_TEXT: end} | special
    for first, second in pairwise(sorted(special)):
        if second.startswith(first):  # tiktoken would take either
            raise UserError(
                f"{path}: special token {brief(second)} begins with another, "
                f"{brief(first)}, which is not supported"
            )
    return special, end


def _pattern(path: Path, step: dict) -> str:
    """Return the regular expression that splits a text into words."""
    steps = step.get("pretokenizers") or [step]
    pattern, last = None, steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            pattern = PATTERN
        elif (
            len(steps) == 2
            and not last.get("use_regex", True)
            and steps[0]["type"] == "Split"
            and steps[0]["behavior"] == "Isolated"
            and not steps[0].get("invert")
        ):
            own = steps[0]["pattern"].get("Regex")
            if own and not (
                DIFFERENT.search(own)
                or ANCHOR.search(CLASS.sub("", own))
                or _matches_empty_text(own)
            ):
                # What lies between two matches is a word, too; tiktoken would drop it.
                pattern = rf"{own}|(?:(?!{own})[\s\S])+"
    if not pattern:
        raise UserError(
            f"{path}: pre_tokenizer {brief(step)} is not supported; only byte-level, "
            "with GPT-2's pattern or one of its own"
        )
    return pattern


def _matches_empty_text(pattern: str) -> bool:
    """Return whether a pattern matches the empty text between two characters; tiktoken would drop
    the next one.
    """
    with suppress(re.error):  # Python has no \p{L}: any class will do, since only width counts
        return not all(m[0] for m in re.finditer(PROPERTY.sub(r"\\w", pattern), PROBE))
    return False


def _read(directory: Path, file: str) -> dict:
    """Read a file, or {} if the base lacks it."""
    return read_json(directory / file) if (directory / file).exists() else {}


@cache
def _characters() -> list[str]:
    """List the character that spells each byte: itself if printable, else one from 256 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Copy the tokenizer's files, which stock transformers loads. What is there already stays."""
    for name in FILES:
        if (tokenizer.source / name).exists() and not (directory / name).exists():
            with atomic_path(directory / name) as temporary:
                temporary.write_bytes((tokenizer.source / name).read_bytes())
