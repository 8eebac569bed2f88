"""Choose names for bases, and write tokenizer files, so that transformers, PEFT and other tools can
use them."""

import json
import os
from pathlib import Path
from typing import Any

from common.files import atomic_path, display_path
from data.tokenizer import FAST, SETTINGS, SPECIAL, TEMPLATE, Tokenizer
from storage.hub import REPOSITORIES

# Fields of tokenizer_config.json that contain paths. A path may contain a user's name.
PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")


def portable_name(base: str) -> str:
    """Return a base's name in a form that may be published. A directory gets a `./` in front."""
    is_name = base == "mini" or base in REPOSITORIES
    if is_name or not (os.path.isabs(base) or os.path.isdir(base)):
        return base
    return f"./{display_path(Path(base))}"


def stock_name(base: str) -> str:
    """Return a base's name for transformers and PEFT. `mini` becomes a path in the project."""
    if base == "mini":
        return "./model/mini"
    return REPOSITORIES.get(base, portable_name(base))


def save_tokenizer(
    tokenizer: Tokenizer, directory: Path, longest: int, chat_template: str | None = None
) -> None:
    """Write the base's tokenizer files, and add the settings that transformers needs.

    `longest` is the model's context, in tokens. `chat_template` replaces the base's template. An
    existing file is kept.
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
    """Return `tokenizer_config.json`: the base's settings, completed for transformers."""
    settings = json.loads(tokenizer.files.get(SETTINGS, b"{}"))
    named = json.loads(tokenizer.files.get(SPECIAL, b"{}")) | settings
    for field in PATHS:
        settings.pop(field, None)

    # transformers infers the tokenizer's class from config.json, which an adapter's directory
    # lacks.
    fast = FAST in tokenizer.files
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast" if fast else "GPT2Tokenizer")
    settings["model_max_length"] = longest
    for field in ("eos_token", "pad_token"):
        if tokenizer.eos_token and not named.get(field):
            settings[field] = tokenizer.eos_token
    return settings
