"""Find a base or an adapter: a directory, the bundled mini, or a repository on the hub.

The hub is Hugging Face's. `huggingface_hub` downloads, and decides where files are cached, who is
logged in, which mirror is asked and whether the network may be used: its environment variables
hold here, too. It is imported only where a repository is asked for.
"""

import importlib.util
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from common.errors import UserError, first_line
from common.files import file_sha256
from data import tokenizer_files
from storage.weights import CONFIG, PICKLED_WEIGHTS, WEIGHTS, find_weights

OWNER = "openai-community"
REPOSITORIES = {
    "gpt2": f"{OWNER}/gpt2",
    "gpt2-medium": f"{OWNER}/gpt2-medium",
    "gpt2-large": f"{OWNER}/gpt2-large",
    "gpt2-xl": f"{OWNER}/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_NAMES = tuple(REPOSITORIES)
MINI = Path(__file__).resolve().parents[1] / "model" / "mini"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "hub"  # for files placed by hand
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?")
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_SHA256 = {
    CONFIG: "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
    WEIGHTS: "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
}
TEMPLATE = tokenizer_files.TEMPLATE
TOKENIZERS = tuple(
    name for name in (*tokenizer_files.FILES, *tokenizer_files.FOREIGN) if name != TEMPLATE
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROBE_SECONDS = 3  # how long `auto` waits for the hub
PATIENCE = 10  # how long a base named outright waits for the hub
EXTRA = "pip install -e '.[hub]'"


def find_base(base: str) -> tuple[str, Path]:
    """Return the name and the directory of a base.

    `base` is a directory, one of HUB_NAMES, `mini`, `auto`, or a repository OWNER/NAME[@REVISION].
    `auto` is gpt2 if it is cached or can be downloaded, else mini; it prints which and why. A name
    such as `gpt2` wins over a directory of that name, a directory over a repository. Raises
    UserError for a base that cannot be had.
    """
    if base == "auto":
        return _gpt2_or_mini()
    if base == "mini":
        return base, MINI
    if base in HUB_NAMES:
        return base, _cached(base) or _download(base)
    if os.path.isdir(base):
        return base, Path(base)

    match = REPOSITORY.fullmatch(base)
    if match is None:
        names = ", ".join(("auto", "mini", *HUB_NAMES))
        raise UserError(
            f"--base {base!r}: no such directory, and none of the names {names}; a repository on "
            "the hub is OWNER/NAME"
        )
    repository, revision = match.groups()
    return base, _fetch_base(repository, revision, TOKENIZERS)


def find_adapter(adapter: str) -> Path:
    """Return the directory of an adapter, which is a directory or OWNER/NAME[@REVISION].

    Raises UserError for a repository that cannot be had. Anything else is taken for a directory.
    """
    match = REPOSITORY.fullmatch(adapter)
    if match is None or os.path.exists(adapter):
        return Path(adapter)
    repository, revision = match.groups()
    config = _fetch_first(repository, ADAPTER_CONFIG, revision)
    commit = config.parent.name
    if not any(_fetch(repository, file, commit) for file in ADAPTER_WEIGHTS):
        raise UserError(f"{repository}: holds neither {' nor '.join(ADAPTER_WEIGHTS)}")
    with suppress(UserError):  # an adapter works without it, and it may have none
        _fetch(repository, TEMPLATE, commit)
    return config.parent


def split_revision(base: str) -> tuple[str, str | None]:
    """Return a base's name and, of OWNER/NAME@REVISION, the revision."""
    match = REPOSITORY.fullmatch(base)
    if match is None or os.path.isdir(base):
        return base, None
    return match[1], match[2]


def _gpt2_or_mini() -> tuple[str, Path]:
    try:
        directory = _cached("gpt2")
        if directory:
            print(f"base: gpt2 (cached in {directory})")
        else:
            _probe(REPOSITORIES["gpt2"], CONFIG, GPT2_REVISION, PROBE_SECONDS)
            directory = _download("gpt2")
            print(f"base: gpt2 (downloaded to {directory})")
        return "gpt2", directory
    except UserError as error:
        print(f"base: mini (gpt2 is not cached and {error})")
        return "mini", MINI


def _cached(name: str) -> Path | None:
    """Return where the base of this name is cached: by huggingface_hub, or in the project."""
    candidates = [CACHE / name]  # last, and the only one where the library is missing
    if _has_library():
        from huggingface_hub import try_to_load_from_cache

        revisions = [GPT2_REVISION, "main"] if name == "gpt2" else ["main"]
        for repository in (name, REPOSITORIES[name]):  # transformers used to cache it as `name`
            for revision in revisions:
                config = try_to_load_from_cache(repository, CONFIG, revision=revision)
                if isinstance(config, str):
                    candidates.append(Path(config).parent)
    for directory in reversed(candidates):
        if _is_model(directory):
            return directory
    return None


def _is_model(directory: Path) -> bool:
    """Return whether config and weights are there; a link to a missing file does not count."""
    weights = find_weights(directory)
    return os.path.exists(directory / CONFIG) and weights is not None and weights.exists()


def _probe(repository: str, file: str, revision: str | None, seconds: float) -> None:
    """Raise UserError if the hub does not answer in time, or has no such file.

    The library's own download would try six times in 23 seconds.
    """
    _need_library()
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import ENDPOINT

    failures: list[Exception] = []

    def ask() -> None:
        try:
            url = hf_hub_url(repository, file, revision=revision)
            get_hf_file_metadata(url, timeout=seconds)
        except Exception as error:  # of requests or of httpx, by the library's version
            failures.append(error)

    # The time-out covers neither the name look-up nor all of a host's addresses together.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UserError(f"{repository}: {ENDPOINT} cannot be reached (no answer in {seconds} s)")
    if failures:
        raise UserError(f"{repository}: {_reason(failures[0], file)}")


def _download(name: str) -> Path:
    """Download the base of this name; GPT-2's own tokenizer comes with the project."""
    revision = GPT2_REVISION if name == "gpt2" else None
    try:
        return _fetch_base(REPOSITORIES[name], revision, ())
    except UserError as error:
        raise UserError(
            f"{error}; place {CONFIG} and {WEIGHTS} by hand in {CACHE / name}, "
            "set HF_ENDPOINT to a mirror, or use --base mini"
        ) from error


def _fetch_base(repository: str, revision: str | None, others: tuple[str, ...]) -> Path:
    """Download config and weights, and those of the `others` that are there, if not cached."""
    config = _fetch_first(repository, CONFIG, revision)
    commit = config.parent.name  # all files are of the revision that the first one had
    for file in others:
        _fetch(repository, file, commit)
    # Of the two forms of the weights, one is enough.
    if not (_fetch(repository, WEIGHTS, commit) or _fetch(repository, PICKLED_WEIGHTS, commit)):
        raise UserError(
            f"{repository}: holds neither {WEIGHTS} nor {PICKLED_WEIGHTS}; weights in several "
            "files are not read"
        )
    return config.parent


def _fetch_first(repository: str, file: str, revision: str | None) -> Path:
    """Return the path of a file that the repository must hold, as `_fetch` does."""
    _need_library()
    from huggingface_hub import try_to_load_from_cache

    if try_to_load_from_cache(repository, file, revision=revision) is None:
        _probe(repository, file, revision, PATIENCE)
    path = _fetch(repository, file, revision)
    if path is None:
        raise UserError(f"{repository}: holds no {file}")
    return path


def _fetch(repository: str, file: str, revision: str | None) -> Path | None:
    """Return the path of a file in huggingface_hub's cache, or None if the repository lacks it.

    It is downloaded if it is not there; an interrupted download is continued. Raises
    UserError if the file cannot be had, or is not the expected one.
    """
    _need_library()
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(repository, file, revision=revision)
        if cached is _CACHED_NO_EXIST:
            return None
        path = Path(hf_hub_download(repository, file, revision=revision))
    except LocalEntryNotFoundError as error:  # no answer, and it is not cached
        raise UserError(f"{repository}: {_reason(error.__cause__ or error, file)}") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # of requests or of httpx, by the library's version
        raise UserError(f"{repository}: {_reason(error, file)}") from error

    if cached is None:
        _verify(repository, path, GPT2_SHA256.get(file) if revision == GPT2_REVISION else None)
    return path


def _verify(repository: str, path: Path, sha256: str | None) -> None:
    """Compare a downloaded file with its sha256. Raises UserError, and removes it, if it differs.

    Without one, use the cache's name for a large file: the sha256 that the hub sent.
    """
    blob = path.resolve()
    if sha256 is None and re.fullmatch("[0-9a-f]{64}", blob.name):
        sha256 = blob.name
    if sha256 is None:
        return
    found = file_sha256(blob)
    if found != sha256:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{repository}: {path.name} has sha256 {found} where {sha256} is expected; try again"
        )


def _reason(error: BaseException, file: str) -> str:
    """Say in one line why a file cannot be had."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "is not cached, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"asks at {hub} to accept its terms first; then log in (hf auth login) or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such directory, and no such repository at {hub}; if it is private, log in "
            "(hf auth login) or set HF_TOKEN"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"holds no {file}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no such revision at {hub}"
    return f"cannot be had from {hub} ({type(error).__name__}: {first_line(error):.200})"


def _has_library() -> bool:
    return importlib.util.find_spec("huggingface_hub") is not None


def _need_library() -> None:
    if not _has_library():
        raise UserError(f"huggingface_hub is not installed; {EXTRA}")
