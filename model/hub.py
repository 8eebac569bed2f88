"""Where a base is: a directory, the bundled mini, or GPT-2 from a cache or the Hugging Face hub."""

import hashlib
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from errors import UserError
from files import atomic_path
from model.checkpoint import PICKLED_WEIGHTS, WEIGHTS

CONFIG = "config.json"
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OWNER = "openai-community"
MINI = Path(__file__).resolve().with_name("mini")
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "hub"

REVISIONS = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}  # the others: main
GPT2_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
GPT2_CONFIG_SHA256 = "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4"
MEDIUM_SHA256 = "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"
PINS = {  # size and sha256; what is not here, or None, the hub itself says
    ("gpt2", WEIGHTS): (548_105_171, GPT2_SHA256),
    ("gpt2", CONFIG): (665, GPT2_CONFIG_SHA256),
    ("gpt2-medium", WEIGHTS): (None, MEDIUM_SHA256),
}
WAITS = (0, 1, 4)  # seconds before each try of a download
SOCKET_SECONDS = 10
PROBE_SECONDS = 3


class HubError(Exception):
    """What was asked of the hub, what went wrong, and whether another try would end the same."""

    def __init__(self, url: str, reason: str, final: bool = True):
        super().__init__(" ".join(f"{url} {reason}".split()))  # one line, whatever a server says
        self.reason, self.final = reason, final


def find_base(base: str) -> tuple[str, Path]:
    """The name and directory of `base`: a directory itself, one of HUB_NAMES, `mini` or `auto`.

    The name is `base`, for `auto` the one it took. A name means the name even where a directory
    is called the same. Raises UserError for a base that does not exist, and for a hub name that
    is neither cached nor can be downloaded. Only `auto` falls back, to `mini`; it prints a line
    that says which base it took and why.
    """
    if base == "auto":
        return _gpt2_or_mini()
    if base == "mini":
        return base, MINI
    if base in HUB_NAMES:
        try:
            return base, _cached(base) or _download(base)
        except HubError as error:
            raise UserError(
                f"{error}; place {CONFIG} and {WEIGHTS} by hand in {CACHE / base}, "
                "set HF_ENDPOINT to a mirror, or use --base mini"
            ) from error
    if os.path.isdir(base):
        return base, Path(base)
    names = ", ".join(("auto", "mini", *HUB_NAMES))
    raise UserError(f"--base {base!r}: no such directory, and none of the names {names}")


def _gpt2_or_mini() -> tuple[str, Path]:
    try:
        if directory := _cached("gpt2"):
            print(f"base: gpt2 (cached in {directory})")
        else:
            _probe()
            directory = _download("gpt2")
            print(f"base: gpt2 (downloaded from {_endpoint()})")
        return "gpt2", directory
    except (HubError, UserError) as error:  # UserError: the project's cache cannot be written
        print(f"base: mini (gpt2 is not cached and {error})")
        return "mini", MINI


def _cached(name: str) -> Path | None:
    """The model's directory in the user's Hugging Face cache, else in the project's, else None."""
    for folder in (f"models--{OWNER}--{name}", f"models--{name}"):  # the second is the old name
        repository = _hugging_face_cache() / folder
        try:
            main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            main = ""
        snapshots = (repository / "snapshots").glob("*")
        for snapshot in sorted(snapshots, key=lambda path: (path.name != main, path.name)):
            if _is_model(snapshot):
                return snapshot
    return CACHE / name if _is_model(CACHE / name) else None


def _hugging_face_cache() -> Path:
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{user_cache}/huggingface"
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub"))


def _is_model(directory: Path) -> bool:
    """Whether config and weights are both there; a link to a missing blob does not count."""
    # os.path.isfile, because Path.is_file raises where a directory may not be entered
    has_weights = any(os.path.isfile(directory / file) for file in (WEIGHTS, PICKLED_WEIGHTS))
    return has_weights and os.path.isfile(directory / CONFIG)


def _probe() -> None:
    """Raise HubError unless the hub answers a request for gpt2's config in PROBE_SECONDS.

    In a thread, because a socket's time-out bounds neither the look-up of a name nor the sum
    over all of a host's addresses.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            _open(_url("gpt2", CONFIG), PROBE_SECONDS)[0].close()
            answers.put(None)
        except HubError as error:
            answers.put(error.reason)

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        problem = f"cannot be reached (no answer in {PROBE_SECONDS} s)"
    if problem:
        raise HubError(_endpoint(), problem)


def _download(name: str) -> Path:
    """Fetch what the project's cache lacks of `name`. Raises HubError, UserError on writing."""
    for file in (WEIGHTS, CONFIG):  # the config last: without it the directory is no model
        if not os.path.isfile(CACHE / name / file):
            _fetch_with_retries(name, file)
    return CACHE / name


def _fetch_with_retries(name: str, file: str) -> None:
    for wait in WAITS:
        time.sleep(wait)
        try:
            return _fetch(name, file)
        except HubError as error:
            if error.final:
                raise
            failure = error
    raise failure


def _fetch(name: str, file: str) -> None:
    """Stream one file into the project's cache; it appears there only when whole and verified."""
    url = _url(name, file)
    response, linked = _open(url, SOCKET_SECONDS)
    with response:
        size, sha256 = _expected(name, file, linked)
        if sha256 is None and file == WEIGHTS:
            raise HubError(url, "comes with no sha256 to check it by (no X-Linked-ETag)")
        if None not in (size, response.length) and size != response.length:
            raise HubError(url, f"is {response.length:,} bytes where {size:,} are expected")
        size = size or response.length
        digest = hashlib.sha256()
        bar = tqdm(desc=f"{name}/{file}", total=size, unit="B", unit_scale=True)
        with atomic_path(CACHE / name / file) as temporary:
            with open(temporary, "wb") as out, bar:
                for chunk in _chunks(url, response):
                    out.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                received = out.tell()
            if size and received < size:
                raise HubError(url, f"was cut after {received:,} of {size:,} bytes", final=False)
            if sha256 and digest.hexdigest() != sha256:
                raise HubError(url, f"has sha256 {digest.hexdigest()} where {sha256} is expected")
            if file == CONFIG and not _is_json_object(temporary):
                raise HubError(url, "is not a JSON object")


def _expected(name: str, file: str, linked: dict[str, str]) -> tuple[int | None, str | None]:
    """A file's size and sha256: pinned, else as the hub says, else None."""
    size, sha256 = PINS.get((name, file), (None, None))
    said_size = re.fullmatch(r"\d+", linked.get("X-Linked-Size", ""))
    # 64 digits: a small file's tag is its 40-digit git hash, which is no sha256
    said_sha256 = re.fullmatch(r'"?([0-9a-f]{64})"?', linked.get("X-Linked-ETag", ""))
    size = size or (int(said_size[0]) if said_size else None)
    return size, sha256 or (said_sha256[1] if said_sha256 else None)


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def _chunks(url: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read(1 << 20):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise HubError(url, f"was cut ({error})", final=False) from error


def _open(url: str, seconds: float) -> tuple[http.client.HTTPResponse, dict[str, str]]:
    """The answer at the end of the redirects, and the X-Linked headers met on the way."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise HubError(url, "cannot be reached (HF_HUB_OFFLINE is set)")
    if not url.startswith(("https://", "http://")):
        raise HubError(url, "is not a web address (see HF_ENDPOINT)")
    redirects = _Redirects()
    try:
        response = urllib.request.build_opener(redirects).open(url, timeout=seconds)
    except urllib.error.HTTPError as error:
        error.close()
        raise HubError(url, f"answers {error.code} {error.reason}", error.code < 500) from error
    except (urllib.error.URLError, http.client.InvalidURL, ValueError) as error:
        raise HubError(url, f"cannot be reached ({getattr(error, 'reason', error)})") from error
    except (OSError, http.client.HTTPException) as error:  # connected, but no whole answer came
        raise HubError(url, f"was cut ({error})", final=False) from error
    redirects.keep(response.headers)
    return response, redirects.linked


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps what the hub says of a file: its CDN does not repeat it."""

    def __init__(self) -> None:
        self.linked: dict[str, str] = {}

    def keep(self, headers: http.client.HTTPMessage) -> None:
        for field in ("X-Linked-Size", "X-Linked-ETag"):
            if field in headers:
                self.linked.setdefault(field, headers[field])

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.keep(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _url(name: str, file: str) -> str:
    return f"{_endpoint()}/{OWNER}/{name}/resolve/{REVISIONS.get(name, 'main')}/{file}"
