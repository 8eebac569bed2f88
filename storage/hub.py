"""Find a base or an adapter: a directory, the bundled mini, or a repository on the hub.

The library `huggingface_hub` downloads from the Hugging Face hub and caches the files. The library
is imported only if a repository is needed. The library's environment variables apply.
"""

import os
import re
from pathlib import Path
from types import ModuleType

from common.errors import UserError
from common.files import file_sha256
from data.tokenizer import TEMPLATE
from storage.weights import CONFIG, PICKLED_WEIGHTS, WEIGHTS, find_weights

REPOSITORIES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
MINI = Path(__file__).resolve().parents[1] / "model" / "mini"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "hub"  # a user can put files here
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?")
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_SHA256 = {
    CONFIG: "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
    WEIGHTS: "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
}
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", TEMPLATE)
# Timeouts in seconds. The hub's host name has four IP addresses, and a request that tries all four
# gives each of them the whole timeout. The timeout of `auto` is 1 second, so `auto` waits for at
# most 4 seconds.
AUTO_SECONDS = 1
NAMED_SECONDS = 10


def find_base(base: str) -> tuple[str, Path]:
    """Return the name and the directory of a base.

    `base` is `auto`, `mini`, a key of REPOSITORIES, a directory, or a repository
    OWNER/NAME[@REVISION]. `auto` is gpt2 if gpt2 is cached or can be downloaded, and mini
    otherwise. This choice and its reason are printed. A name such as `gpt2` wins over a directory
    with this name. A directory wins over a repository. Raises UserError for a base that is not
    available.
    """
    if base == "auto":
        return _gpt2_or_mini()
    if base == "mini":
        return base, MINI
    if base in REPOSITORIES:
        return base, _cached(base) or _download(base, NAMED_SECONDS)
    if os.path.isdir(base):
        return base, Path(base)

    match = _as_repository(base)
    if match is None:
        names = ", ".join(("auto", "mini", *REPOSITORIES))
        raise UserError(
            f"--base {base!r}: no such directory, and none of the names {names}; a repository on "
            "the hub is OWNER/NAME"
        )
    repository, revision = match.groups()
    directory = _snapshot(repository, revision, (CONFIG, WEIGHTS, TEMPLATE, ADAPTER[0], *TOKENIZER))
    for name in (PICKLED_WEIGHTS, "*.index.json"):  # an index names shards, which are refused
        if find_weights(directory) is None:
            _snapshot(repository, revision, (name,))
    find_weights(directory)
    return base, directory


def find_adapter(adapter: str) -> Path:
    """Return the directory of an adapter.

    OWNER/NAME[@REVISION] names a repository, unless a local file or directory has this name, or
    OWNER is a local directory. Any other name means a directory. Raises UserError for a repository
    that is not available.
    """
    match = _as_repository(adapter)
    if match is None:
        return Path(adapter)
    repository, revision = match.groups()
    return _snapshot(repository, revision, ADAPTER)


def split_revision(base: str) -> tuple[str, str | None]:
    """Split OWNER/NAME@REVISION into name and revision. A base in any other form has no
    revision."""
    match = REPOSITORY.fullmatch(base)
    if match is None or os.path.isdir(base):
        return base, None
    return match[1], match[2]


def _as_repository(name: str) -> re.Match | None:
    """Match OWNER/NAME[@REVISION]. Return None if `name` or its parent directory exists as a path,
    or if `name` does not match."""
    if os.path.exists(name) or os.path.isdir(os.path.dirname(name)):
        return None
    return REPOSITORY.fullmatch(name)


def _gpt2_or_mini() -> tuple[str, Path]:
    try:
        directory = _cached("gpt2")
        if directory:
            print(f"base: gpt2 (cached in {directory})")
        else:
            directory = _download("gpt2", AUTO_SECONDS)
            print(f"base: gpt2 (downloaded to {directory})")
        return "gpt2", directory
    except UserError as error:
        print(f"base: mini (gpt2 is not cached, and {error})")
        return "mini", MINI


def _cached(name: str) -> Path | None:
    """Return the directory of a base in `CACHE` or in the library's cache, or None."""
    by_hand = CACHE / name
    if (by_hand / CONFIG).exists() and find_weights(by_hand):
        return by_hand
    hub = _library()
    # transformers may have cached the base under its short name, such as gpt2.
    for repository in (REPOSITORIES[name], name):
        config = hub.try_to_load_from_cache(repository, CONFIG, revision=_revision(name))
        if isinstance(config, str) and find_weights(Path(config).parent):
            return Path(config).parent
    return None


def _revision(name: str) -> str | None:
    return GPT2_REVISION if name == "gpt2" else None


def _download(name: str, seconds: float) -> Path:
    """Download a base's config and weights. The project already contains GPT-2's tokenizer."""
    repository = REPOSITORIES[name]
    directory = _snapshot(repository, _revision(name), (CONFIG, WEIGHTS), seconds)
    if name != "gpt2":
        return directory
    for file, sha256 in GPT2_SHA256.items():
        path = directory / file
        found = file_sha256(path)
        if found != sha256:
            path.resolve().unlink()  # in the cache, `path` is a link
            path.unlink(missing_ok=True)
            raise UserError(f"{repository}: {file} has sha256 {found}, and not {sha256}; try again")
    return directory


def _snapshot(
    repository: str, revision: str | None, files: tuple[str, ...], seconds: float | None = None
) -> Path:
    """Return the directory of the repository's `files` in the library's cache. Download missing
    files. Raises UserError, with the library's reason, for files that are not available.

    With `seconds`, first send the hub a single request with this timeout. The library alone would
    try six times, which takes 23 seconds without a network.
    """
    hub = _library()
    try:
        if seconds:
            url = hub.hf_hub_url(repository, CONFIG, revision=revision)
            hub.get_session().head(url, timeout=seconds).raise_for_status()
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # versions of the library raise different exceptions
        name = f"{repository}@{revision}" if revision else repository
        reason = " ".join(str(error).split())  # the file's address and the server's sentence
        raise UserError(
            f"{name} is neither a directory nor available on the hub: "
            f"{type(error).__name__}: {reason:.400}"
        ) from error


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("huggingface_hub is not installed; pip install -e '.[hub]'") from error
    return huggingface_hub
