"""Find a base or an adapter: a directory, the bundled mini, or a repository on the hub.

`huggingface_hub` downloads a repository and caches it. Its environment variables and its login
apply. It is imported only if a repository is needed.
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
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?")
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_SHA256 = {
    CONFIG: "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
    WEIGHTS: "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
}
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", TEMPLATE)


def find_base(base: str) -> tuple[str, Path]:
    """Return the name and the directory of a base.

    `base` is `auto`, `mini`, a key of REPOSITORIES, a directory, or a repository
    OWNER/NAME[@REVISION]. `auto` is gpt2 if gpt2 is cached or the hub answers at once, and mini
    otherwise. This choice and its reason are printed. A name such as `gpt2` wins over a directory
    with this name. A directory wins over a repository. Raises UserError for a base that is not
    available.
    """
    if base == "auto":
        try:
            directory = _known_base("gpt2", seconds=1)
        except UserError as error:
            print(f"base: mini (gpt2 is not cached, and {error})")
            return "mini", MINI
        print(f"base: gpt2 (in {directory})")
        return "gpt2", directory
    if base == "mini":
        return base, MINI
    if base in REPOSITORIES:
        return base, _known_base(base)
    if os.path.isdir(base):
        return base, Path(base)

    if not _names_repository(base):
        names = ", ".join(("auto", "mini", *REPOSITORIES))
        raise UserError(
            f"--base {base!r}: no such directory, and none of the names {names}; a repository on "
            "the hub is OWNER/NAME"
        )
    # An adapter's config and an index of shards let the loader say why this is not a base.
    files = (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", TEMPLATE, ADAPTER[0], *TOKENIZER)
    directory = _snapshot(*split_revision(base), files)
    if find_weights(directory) is None:
        _snapshot(*split_revision(base), (PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json"))
    return base, directory


def find_adapter(adapter: str) -> Path:
    """Return the directory of an adapter: a path, or OWNER/NAME[@REVISION] on the hub. Raises
    UserError for a repository that is not available."""
    if _names_repository(adapter):
        return _snapshot(*split_revision(adapter), ADAPTER)
    return Path(adapter)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split OWNER/NAME@REVISION. A name in any other form has no revision."""
    match = REPOSITORY.fullmatch(name)
    return (match[1], match[2]) if match else (name, None)


def _names_repository(name: str) -> bool:
    """Return whether `name` is OWNER/NAME[@REVISION], and neither it nor OWNER is a local path."""
    is_local = os.path.exists(name) or os.path.isdir(os.path.dirname(name))
    return not is_local and REPOSITORY.fullmatch(name) is not None


def _known_base(name: str, seconds: float = 10) -> Path:
    """Return the directory of a key of REPOSITORIES, from the cache or from the hub, which has
    `seconds` to answer. Raises UserError for a `gpt2` other than the known one, and removes it."""
    repository = REPOSITORIES[name]
    revision = GPT2_REVISION if name == "gpt2" else None
    config = _library().try_to_load_from_cache(repository, CONFIG, revision=revision)
    if isinstance(config, str) and find_weights(Path(config).parent):
        return Path(config).parent

    directory = _snapshot(repository, revision, (CONFIG, WEIGHTS), seconds)
    for file, sha256 in GPT2_SHA256.items() if name == "gpt2" else ():
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
    """Return the directory of a repository's `files` in the cache of `huggingface_hub`. Raises
    UserError, with the reason that the library gives, for files that are not available."""
    hub = _library()
    try:
        if seconds:  # for a pinned revision, the library alone would try for 23 seconds
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
