"""Load the base and the adapter that `--base` and `--adapter` name."""

from pathlib import Path
from typing import NamedTuple

import torch

from common.cli import NONE
from common.errors import UserError, as_failure
from common.files import brief, file_sha256
from data.tokenizer import Tokenizer, load_tokenizer
from lora.load import load_adapter, read_header, stored_base_name
from lora.quantised import LAYERS
from lora.save import QUANTISED, WEIGHTS
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
    kind = choose_quantisation(quantise, adapter)
    model = load_gpt2(directory, dtype, LAYERS[kind] if kind else None)
    if adapter:
        with as_failure():
            load_adapter(model, adapter, file_sha256(weights_path(directory)))
    return Loaded(name, model, load_tokenizer(directory, model.config.vocab_size))


def recorded_quantisation(adapter: Path) -> str | None:
    """Return how the adapter's base was quantised, as the adapter's file records it, or None."""
    path = adapter / WEIGHTS
    if not path.exists():  # `load_adapter` reports the missing file
        return None
    with as_failure():
        kind = read_header(adapter).get(QUANTISED)
    if kind is not None and kind not in LAYERS:
        raise UserError(f"{path}: the base was quantised to {brief(kind)}, which is unknown")
    return kind


def choose_quantisation(asked: str | None, adapter: Path | None) -> str | None:
    """Return how to quantise the base: a key of `LAYERS`, or None.

    `asked` is the value of --quantise, which wins. Without --quantise, use and print the
    quantisation that the adapter records.
    """
    if asked is not None:
        return None if asked == NONE else asked
    kind = recorded_quantisation(adapter) if adapter else None
    if kind:
        print(f"the base is quantised to {kind}, as in the adapter's training (--quantise)")
    return kind
