"""Load the base and the adapter that `--base` and `--adapter` name."""

from pathlib import Path
from typing import NamedTuple

import torch

from adapters.quantisation import choose_quantisation
from common.errors import UserError, as_failure
from common.files import brief, file_sha256
from data.tokenizer import Tokenizer, load_tokenizer
from lora.load import load_adapter, stored_base_name
from lora.quantised import LAYERS
from model.gpt2 import GPT2
from storage.hf_compat import stock_name
from storage.hub import REPOSITORIES, REPOSITORY, find_adapter, find_base, split_revision
from storage.weights import load_gpt2, weights_path


class Loaded(NamedTuple):
    """A model in evaluation mode, with the name and the tokenizer of its base."""

    base: str
    model: GPT2
    tokenizer: Tokenizer


def named_base(adapter: Path) -> str:
    """Return the base that the adapter names: a known name, or OWNER/NAME[@REVISION] on the hub.
    Raises UserError for any other name, such as a path on another machine."""
    with as_failure():
        named = stored_base_name(adapter)
    repository, _ = split_revision(str(named))
    for name, known in REPOSITORIES.items():
        if repository in (name, known):
            return name
    if named in ("mini", stock_name("mini")):
        return "mini"
    if isinstance(named, str) and REPOSITORY.fullmatch(named):
        return named
    raise UserError(
        f"{adapter}: its base {brief(named)} is unknown; name its directory: --base DIR"
    )


def load_with_adapter(
    base: str,
    adapter: Path | None,
    dtype: torch.dtype = torch.float32,
    quantise: str | None = None,
) -> Loaded:
    """Load a base in `dtype`, and the adapter, if any.

    The adapter is a directory, or OWNER/NAME on the hub. With the base `auto`, the adapter names
    the base. `quantise` is the value of --quantise. Raises UserError if the adapter records the
    hash of another base.
    """
    if adapter:
        adapter = find_adapter(str(adapter))
    if adapter and base == "auto":
        base = named_base(adapter)
    name, directory = find_base(base)
    kind = choose_quantisation(quantise, [adapter] if adapter else [])
    model = load_gpt2(directory, dtype, LAYERS[kind] if kind else None)
    if adapter:
        with as_failure():
            load_adapter(model, adapter, file_sha256(weights_path(directory)))
    return Loaded(name, model, load_tokenizer(directory, model.config.vocab_size))
