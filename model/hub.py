"""Find a base: a directory, the bundled mini, or GPT-2 from a cache or the Hugging Face hub."""

import hashlib
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_path
from model.weights import CONFIG, WEIGHTS, find_weights

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OWNER = "openai-community"
MINI = Path(__file__).resolve().with_name("mini")
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "hub"
REVISIONS = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}  # the others: main
SHA256 = {  # for other weights the hub sends it
    ("gpt2", WEIGHTS): "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ("gpt2", CONFIG): "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
    ("gpt2-medium", WEIGHTS): "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
}
WAITS = (1, 4)  # seconds before each further try of a download
SOCKET_SECONDS, PROBE_SECONDS = 10, 3


class HubError(Exception):
    """A failed request to the hub; `final` means that another try would fail too."""

    def __init__(self, url: str, reason: str, final: bool = True):
        super().__init__(" ".join(f"{url} {reason}".split()))  # one line, whatever a server says
        self.final = final


def find_base(base: str) -> tuple[str, Path]:
    """Return the name and directory of `base`: a directory, one of HUB_NAMES, `mini` or `auto`.

    `auto` is gpt2 if it is cached or can be downloaded, else mini; it prints which and why. A name
    wins over a directory of that name. Raises UserError for a base that cannot be had.
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
    """Return the directory in the user's Hugging Face cache, else in the project's, else None."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    cache = os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{cache}/hub"  # its older name
    cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or cache)
    cache = Path(os.path.expandvars(cache))
    for folder in (f"models--{OWNER}--{name}", f"models--{name}"):  # the second is the old name
        main, snapshots = "", []
        with suppress(OSError, ValueError):
            snapshots = [*(cache / folder / "snapshots").glob("*")]
            main = (cache / folder / "refs" / "main").read_text(encoding="utf-8").strip()
        for snapshot in sorted(snapshots, key=lambda path: (path.name != main, path.name)):
            if _is_model(snapshot):
                return snapshot
    return CACHE / name if _is_model(CACHE / name) else None


def _is_model(directory: Path) -> bool:
    """Return whether config and weights are there; a link to a missing blob does not count."""
    return os.path.exists(directory / CONFIG) and os.path.exists(find_weights(directory) or "")


def _probe() -> None:
    """Raise HubError if the hub stays silent for PROBE_SECONDS."""

    def ask() -> None:
        with suppress(HubError):  # the download will meet it again
            _open(_url("gpt2", CONFIG))[0].close()

    # A socket's time-out covers neither the name look-up nor all of a host's addresses together.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        raise HubError(_endpoint(), f"cannot be reached (no answer in {PROBE_SECONDS} s)")


def _download(name: str) -> Path:
    """Download those files of `name` that the project's cache lacks."""
    for file in (WEIGHTS, CONFIG):  # config last: without it the directory is not a model
        waits = list(WAITS)
        while not os.path.isfile(CACHE / name / file):
            try:
                _fetch(name, file)
            except HubError as error:
                if error.final or not waits:
                    raise
                time.sleep(waits.pop(0))
    return CACHE / name


def _fetch(name: str, file: str) -> None:
    """Download one file into the project's cache; it appears there only when whole and verified."""
    url = _url(name, file)
    response, etag = _open(url)
    size = response.length  # None if the server does not say
    # 64 digits: a small file's tag is its 40-digit git hash, which is no sha256
    tag = re.fullmatch(r'"?([0-9a-f]{64})"?', etag or "")
    sha256 = SHA256.get((name, file)) or (tag[1] if tag else None)
    if sha256 is None and file == WEIGHTS:
        raise HubError(url, "comes with no sha256 to check it by (no X-Linked-ETag)")
    digest = hashlib.sha256()
    bar = tqdm(desc=f"{name}/{file}", total=size, unit="B", unit_scale=True)
    with response, bar, atomic_path(CACHE / name / file) as temporary:
        with open(temporary, "wb") as out:
            while chunk := _read(url, response):
                out.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            received = out.tell()
        if size and received != size:
            raise HubError(url, f"ended after {received:,} of {size:,} bytes", final=False)
        if sha256 and digest.hexdigest() != sha256:
            raise HubError(url, f"has sha256 {digest.hexdigest()} where {sha256} is expected")


def _read(url: str, response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise HubError(url, f"was cut ({error})", final=False) from error


def _open(url: str) -> tuple[http.client.HTTPResponse, str | None]:
    """Return the answer at the end of the redirects, and X-Linked-ETag if it came on the way."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise HubError(_endpoint(), "cannot be reached (HF_HUB_OFFLINE is set)")
    redirects = _Redirects()
    try:
        response = urllib.request.build_opener(redirects).open(url, timeout=SOCKET_SECONDS)
    except urllib.error.HTTPError as error:
        raise HubError(url, f"answers {error.code} {error.reason}", error.code < 500) from error
    except (urllib.error.URLError, http.client.InvalidURL, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise HubError(_endpoint(), f"cannot be reached ({reason})") from error
    except (OSError, http.client.HTTPException) as error:  # connected, but no whole answer came
        raise HubError(url, f"was cut ({error})", final=False) from error
    return response, redirects.etag or response.headers.get("X-Linked-ETag")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, and keep the hub's sha256: its CDN does not repeat it."""

    etag: str | None = None
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 has none

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.etag = self.etag or headers.get("X-Linked-ETag")
        code = 301 if code == 308 else code
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _url(name: str, file: str) -> str:
    return f"{_endpoint()}/{OWNER}/{name}/resolve/{REVISIONS.get(name, 'main')}/{file}"
