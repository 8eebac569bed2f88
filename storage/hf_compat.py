"""Write what stock tools look for beside a model: the base's name, and a tokenizer's settings."""

import json
import os
from pathlib import Path
from typing import Any

from common.files import atomic_path, display_path
from data.tokenizer import END_OF_TEXT, Tokenizer
from data.tokenizer_files import FAST, SETTINGS, SPECIAL, TEMPLATE, WORDS
from storage.hub import HUB_NAMES, REPOSITORIES

MINI_NAME = "./model/mini"  # from the project's directory
PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")  # of whoever saved the base


def portable_name(base: str) -> str:
    """Return a base's name for a file that may be published.

    A directory is ./ and its `display_path`, which nobody takes for a repository.
    """
    is_name = base in ("mini", *HUB_NAMES)
    if is_name or not (os.path.isabs(base) or os.path.isdir(base)):
        return base
    return f"./{display_path(Path(base))}"


def stock_name(base: str) -> str:
    """Return a base's name as stock libraries take it, in the project's directory for `mini`."""
    if base == "mini":
        return MINI_NAME
    return REPOSITORIES.get(base, portable_name(base))


def save_tokenizer(
    tokenizer: Tokenizer, directory: Path, longest: int, chat_template: str | None = None
) -> None:
    """Write the tokenizer's files as they were when it was loaded, but for its settings.

    They get `longest`, the tokens of the model's context, as transformers' `model_max_length`, and
    a token that pads a batch. A `chat_template` replaces the base's. What is there already stays.
    """
    files = dict(tokenizer.files)
    settings = _settings(tokenizer, longest)
    if chat_template is not None:
        settings.pop("chat_template", None)
        files[TEMPLATE] = chat_template.encode()
    files[SETTINGS] = f"{json.dumps(settings, indent=2)}\n".encode()

    for name, content in files.items():
        if not (directory / name).exists():
            with atomic_path(directory / name) as temporary:
                temporary.write_bytes(content)


def _settings(tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`: the base's own, completed."""
    settings = json.loads(tokenizer.files.get(SETTINGS, b"{}"))
    named = json.loads(tokenizer.files.get(SPECIAL, b"{}")) | settings
    for field in PATHS:
        settings.pop(field, None)

    # An adapter's directory has no config.json from which transformers could tell the class.
    settings.setdefault("tokenizer_class", _class_of(tokenizer))
    settings["model_max_length"] = longest
    end = _end_name(tokenizer)
    for field, token in (("eos_token", end), ("pad_token", _pad_name(tokenizer, end))):
        if token and not named.get(field):
            settings[field] = token
    return settings


def _class_of(tokenizer: Tokenizer) -> str:
    """Return the class by which transformers reads the tokenizer's files."""
    if FAST in tokenizer.files:
        return "PreTrainedTokenizerFast"
    return "BertTokenizer" if WORDS in tokenizer.files else "GPT2Tokenizer"


def _pad_name(tokenizer: Tokenizer, end: str | None) -> str | None:
    return "[PAD]" if "[PAD]" in tokenizer.special else end


def _end_name(tokenizer: Tokenizer) -> str | None:
    """Return the base's own name of the end-of-text token; `<|endoftext|>` may be our second."""
    names = [text for text, i in tokenizer.special.items() if i == tokenizer.end_of_text]
    own = [text for text in names if text != END_OF_TEXT]
    return next(iter(own or names), None)
