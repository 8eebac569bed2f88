"""Finding and downloading a base, against a hub of our own that can misbehave in every way."""

import hashlib
import itertools
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from errors import UserError
from model import hub

REAL_PINS = dict(hub.PINS)
WEIGHTS = os.urandom(300_000)
CONFIG = b'{"model_type": "gpt2"}'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Weights: the hub's 302 with the X-Linked headers, then a CDN without. Config: at once."""

    def do_GET(self):
        fake = self.server.fake
        fake.requests.append(self.path)
        file = self.path.rsplit("/", 1)[-1]
        cdn = self.path.startswith("/cdn/")
        if file not in fake.files:
            return self.send_error(404)
        linked = fake.linked if file == hub.WEIGHTS and not cdn else {}
        if linked and fake.redirects:
            return self.answer(302, b"", {"Location": f"/cdn/{file}", **linked})
        fault = next(fake.faults.get(file, iter(())), None)
        if isinstance(fault, int):
            return self.send_error(fault)
        self.answer(200, fake.files[file], linked, fault)

    def answer(self, status: int, body: bytes, headers: dict, fault: str | None = None):
        self.send_response(status)
        if self.server.fake.says_length:
            headers = {"Content-Length": str(len(body)), **headers}
        for field, value in headers.items():
            self.send_header(field, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault else body)
        if fault == "stall":
            time.sleep(0.5)

    def log_message(self, *args):
        pass


class FakeHub:
    def __init__(self, url: str):
        self.url = url
        self.files = {hub.WEIGHTS: WEIGHTS, hub.CONFIG: CONFIG}
        self.linked = {"X-Linked-Size": str(len(WEIGHTS)), "X-Linked-ETag": f'"{sha256(WEIGHTS)}"'}
        self.faults = {}  # file -> iterator of one fault (or None) a request
        self.says_length = self.redirects = True
        self.requests = []

    def asked(self, name: str, file: str, revision: str = "main") -> str:
        return f"{self.url}/openai-community/{name}/resolve/{revision}/{file}"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A hub on this machine, and nothing of the user's: no home, no cache, no proxy."""
    for variable in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub, "CACHE", tmp_path / "project" / "hub")
    monkeypatch.setattr(hub, "WAITS", (0, 0, 0))
    monkeypatch.setattr(hub, "PINS", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fake = FakeHub(f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_ENDPOINT", server.fake.url)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.fake
    server.shutdown()
    server.server_close()


def make_model(directory: Path, weights: str = hub.WEIGHTS) -> Path:
    directory.mkdir(parents=True)
    (directory / weights).write_bytes(b"weights")
    (directory / hub.CONFIG).write_bytes(b"{}")
    return directory


def repository(cache: Path, folder: str = "models--openai-community--gpt2", main: str = "") -> Path:
    (cache / folder / "refs").mkdir(parents=True)
    (cache / folder / "refs" / "main").write_text(main)
    return cache / folder / "snapshots"


def found(name: str) -> list[Path]:
    """All the files that a download of `name` has left, temporary ones included."""
    return sorted(path for path in (hub.CACHE / name).rglob("*") if path.is_file())


def find(base: str) -> Path:
    """The directory, once the name is seen to be the one asked for or the one `auto` took."""
    name, directory = hub.find_base(base)
    if base != "auto":
        assert name == base
    else:
        assert name == ("mini" if directory == hub.MINI else "gpt2")
    return directory


def one_line_error(base: str) -> str:
    with pytest.raises(UserError) as raised:
        hub.find_base(base)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- what needs no hub -------------------------------------------------------------------------


def test_a_directory_is_itself(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert find("mine") == Path("mine")
    assert find(str(tmp_path / "mine")) == tmp_path / "mine"
    assert fake.requests == []


def test_mini_is_bundled_and_silent(fake, capsys):
    assert find("mini") == Path(hub.__file__).parent / "mini"
    assert (fake.requests, *capsys.readouterr()) == ([], "", "")


@pytest.mark.parametrize("base", ["gpt3", "", "runs/no-such", "openai-community/gpt2", "a\nb"])
def test_an_unknown_base_is_refused_with_the_known_ones(fake, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = one_line_error(base)
    assert repr(base) in message and "auto, mini, gpt2, gpt2-medium" in message
    assert fake.requests == []


def test_a_directory_called_as_a_base_does_not_shadow_it(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "mini", "auto"):
        (tmp_path / name).mkdir()
    assert find("gpt2") == hub.CACHE / "gpt2"
    assert find("mini") == hub.MINI
    assert find("auto") == hub.CACHE / "gpt2"
    assert find("./gpt2") == Path("gpt2")


# --- caches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["models--openai-community--gpt2", "models--gpt2"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "variable, value, cache",
    [
        ("HF_HUB_CACHE", "{}/hub-cache", "hub-cache"),
        ("HF_HOME", "{}/hf-home", "hf-home/hub"),
        ("HF_HOME", "", "home/.cache/huggingface/hub"),  # set but empty counts as not set
        ("XDG_CACHE_HOME", "{}/xdg", "xdg/huggingface/hub"),
    ],
)
def test_found_in_the_hugging_face_cache(
    fake, tmp_path, monkeypatch, capsys, folder, weights, variable, value, cache
):
    monkeypatch.setenv(variable, value.format(tmp_path))
    snapshot = make_model(repository(tmp_path / cache, folder, "abc") / "abc", weights)
    assert find("gpt2") == snapshot
    assert (fake.requests, *capsys.readouterr()) == ([], "", "")
    assert find("auto") == snapshot
    assert (fake.requests, capsys.readouterr().out) == ([], f"base: gpt2 (cached in {snapshot})\n")


def test_the_main_revision_comes_first_and_only_whole_snapshots_count(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshots = repository(tmp_path, main="bbb\n")
    for revision in ("aaa", "bbb", "ccc"):
        make_model(snapshots / revision)
    assert find("gpt2") == snapshots / "bbb"
    (snapshots / "bbb" / hub.WEIGHTS).unlink()  # as on the hub: a link into blobs/
    (snapshots / "bbb" / hub.WEIGHTS).symlink_to("../../blobs/0123")
    assert find("gpt2") == snapshots / "aaa"
    (snapshots / "aaa" / hub.CONFIG).unlink()
    assert find("gpt2") == snapshots / "ccc"
    blob = snapshots.parent / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    assert find("gpt2") == snapshots / "bbb"


def test_found_in_the_project_cache(fake, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = make_model(hub.CACHE / "gpt2")
    assert find("gpt2") == directory
    assert (fake.requests, *capsys.readouterr()) == ([], "", "")
    assert find("auto") == directory
    assert (fake.requests, capsys.readouterr().out) == ([], f"base: gpt2 (cached in {directory})\n")


def test_the_users_cache_comes_before_the_projects(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    make_model(hub.CACHE / "gpt2")
    snapshot = make_model(repository(tmp_path) / "abc")
    assert find("gpt2") == snapshot


# --- downloads that succeed --------------------------------------------------------------------


@pytest.mark.parametrize("name", hub.HUB_NAMES)
def test_a_download_is_whole_and_asked_for_once(fake, name, capsys):
    directory = find(name)
    assert found(name) == [directory / hub.CONFIG, directory / hub.WEIGHTS]
    assert (directory / hub.WEIGHTS).read_bytes() == WEIGHTS
    assert (directory / hub.CONFIG).read_bytes() == CONFIG
    revision = "607a30d783dfa663caf39e06633721c8d4cfcd7e" if name == "gpt2" else "main"
    weights, config = (f"/openai-community/{name}/resolve/{revision}/{file}" for file in fake.files)
    assert fake.requests == [weights, "/cdn/model.safetensors", config]
    output = capsys.readouterr()
    assert output.out == "" and f"{name}/{hub.WEIGHTS}: 100%" in output.err
    assert find(name) == directory and len(fake.requests) == 3


def test_auto_downloads_and_says_so(fake, capsys):
    assert find("auto") == hub.CACHE / "gpt2"
    assert capsys.readouterr().out == f"base: gpt2 (downloaded from {fake.url})\n"


@pytest.mark.parametrize("file", [hub.WEIGHTS, hub.CONFIG])
@pytest.mark.parametrize("fault", ["cut", "stall", 500, 503])
def test_a_passing_fault_is_tried_again(fake, monkeypatch, file, fault):
    if fault == "stall":
        monkeypatch.setattr(hub, "SOCKET_SECONDS", 0.2)
    fake.faults[file] = iter([fault])
    directory = find("gpt2-medium")
    assert found("gpt2-medium") == [directory / hub.CONFIG, directory / hub.WEIGHTS]
    assert (directory / file).read_bytes() == fake.files[file]


def test_a_hub_that_does_not_say_lengths(fake):
    fake.says_length = False
    assert hub._is_model(find("gpt2-medium"))


def test_a_mirror_that_serves_the_weights_itself(fake):
    fake.redirects = False
    assert hub._is_model(find("gpt2-medium"))
    assert not any("cdn" in path for path in fake.requests)


def test_a_later_run_takes_up_where_one_stopped(fake):
    fake.faults[hub.CONFIG] = itertools.repeat("cut", 3)
    assert fake.asked("gpt2-large", hub.CONFIG) in one_line_error("gpt2-large")
    directory = hub.CACHE / "gpt2-large"
    assert found("gpt2-large") == [directory / hub.WEIGHTS]  # whole, but no model without a config
    fake.requests.clear()
    assert find("gpt2-large") == directory
    assert fake.requests == ["/openai-community/gpt2-large/resolve/main/config.json"]


# --- downloads that fail -----------------------------------------------------------------------


def always(fault):
    def arrange(fake, monkeypatch):
        fake.faults[hub.WEIGHTS] = itertools.repeat(fault)
        if fault == "stall":
            monkeypatch.setattr(hub, "SOCKET_SECONDS", 0.1)

    return arrange


def cut_without_length(fake, monkeypatch):
    fake.says_length = False
    fake.faults[hub.WEIGHTS] = itertools.repeat("cut")


def wrong_bytes(fake, monkeypatch):
    fake.files[hub.WEIGHTS] = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])


def wrong_size(fake, monkeypatch):
    fake.files[hub.WEIGHTS] = WEIGHTS[:-1]


def other_than_pinned(fake, monkeypatch):
    monkeypatch.setattr(hub, "PINS", {("gpt2", hub.WEIGHTS): (None, "0" * 64)})


def not_of_pinned_size(fake, monkeypatch):
    monkeypatch.setattr(hub, "PINS", {("gpt2", hub.WEIGHTS): (7, sha256(WEIGHTS))})


def no_hash(fake, monkeypatch):
    del fake.linked["X-Linked-ETag"]


def git_hash(fake, monkeypatch):
    fake.linked["X-Linked-ETag"] = f'"{"0" * 40}"'


def no_weights(fake, monkeypatch):
    del fake.files[hub.WEIGHTS]


def redirect_loop(fake, monkeypatch):  # urllib's own message for it has three lines
    fake.linked["Location"] = f"/openai-community/gpt2/resolve/main/{hub.WEIGHTS}"


FAILURES = {  # what goes wrong with the weights: how the message says so, and requests to the hub
    "cut": (always("cut"), "was cut after 150,000 of 300,000 bytes", 3),
    "cut, no length": (cut_without_length, "was cut after 150,000 of 300,000 bytes", 3),
    "stalled": (always("stall"), "was cut (timed out)", 3),
    "503": (always(503), "answers 503", 3),
    "404 at the CDN": (always(404), "answers 404", 1),
    "404": (no_weights, "answers 404", 1),
    "bytes": (wrong_bytes, f"where {sha256(WEIGHTS)} is expected", 1),
    "size": (wrong_size, "is 299,999 bytes where 300,000 are expected", 1),
    "pinned hash": (other_than_pinned, f"where {'0' * 64} is expected", 1),
    "pinned size": (not_of_pinned_size, "is 300,000 bytes where 7 are expected", 1),
    "no hash": (no_hash, "no sha256", 1),
    "git hash": (git_hash, "no sha256", 1),
    "loop": (redirect_loop, "infinite loop", None),
}


@pytest.mark.parametrize("arrange, reason, tries", FAILURES.values(), ids=FAILURES)
def test_a_failed_download_leaves_nothing(fake, monkeypatch, capsys, arrange, reason, tries):
    arrange(fake, monkeypatch)
    asked = fake.asked("gpt2", hub.WEIGHTS, hub.REVISIONS["gpt2"])
    message = one_line_error("gpt2")
    assert message.startswith(f"{asked} ") and reason in message
    for advice in (str(hub.CACHE / "gpt2"), "HF_ENDPOINT", "--base mini"):
        assert advice in message
    if tries:
        assert sum(path in asked for path in fake.requests) == tries
    assert found("gpt2") == [] and capsys.readouterr().out == ""

    assert find("auto") == hub.MINI
    out = capsys.readouterr().out
    assert out.startswith(f"base: mini (gpt2 is not cached and {asked} ") and reason in out
    assert out.count("\n") == 1 and found("gpt2") == []


@pytest.mark.parametrize("config", [b"<html>Log in</html>", b"[]", b"\xff", b'{"model_type": '])
def test_a_config_that_is_not_a_json_object_is_refused(fake, config):
    fake.files[hub.CONFIG] = config
    message = one_line_error("gpt2-xl")
    assert fake.asked("gpt2-xl", hub.CONFIG) in message and "JSON object" in message
    assert [path.name for path in found("gpt2-xl")] == [hub.WEIGHTS]
    assert not hub._is_model(hub.CACHE / "gpt2-xl")


def test_a_pinned_config_is_checked(fake, monkeypatch):
    monkeypatch.setattr(hub, "PINS", {("gpt2", hub.CONFIG): REAL_PINS["gpt2", hub.CONFIG]})
    assert "is 22 bytes where 665 are expected" in one_line_error("gpt2")
    assert not hub._is_model(hub.CACHE / "gpt2")


def test_a_cache_that_cannot_be_written(fake, capsys):
    hub.CACHE.parent.mkdir()
    hub.CACHE.write_text("a file where the directory should be")
    assert str(hub.CACHE / "gpt2" / hub.WEIGHTS) in one_line_error("gpt2")
    assert find("auto") == hub.MINI
    assert str(hub.CACHE / "gpt2" / hub.WEIGHTS) in capsys.readouterr().out


def test_an_interrupt_leaves_nothing(fake, monkeypatch):
    def interrupted(url, response):
        yield response.read(1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find("gpt2")
    assert found("gpt2") == []


# --- hubs that cannot be asked -----------------------------------------------------------------


def closed_port(fake, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/")


def offline(fake, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def not_an_address(fake, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")


def not_a_port(fake, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:port")


def unavailable(fake, monkeypatch):
    fake.faults = {file: itertools.repeat(503) for file in fake.files}


UNREACHABLE = {
    "closed port": (closed_port, "refused"),
    "offline": (offline, "HF_HUB_OFFLINE is set"),
    "not an address": (not_an_address, "HF_ENDPOINT"),
    "not a port": (not_a_port, "port"),
    "503 for ever": (unavailable, "answers 503"),
}


@pytest.mark.parametrize("arrange, reason", UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_hub_that_cannot_be_asked(fake, monkeypatch, capsys, arrange, reason):
    arrange(fake, monkeypatch)
    endpoint = os.environ["HF_ENDPOINT"].rstrip("/")
    message = one_line_error("gpt2")
    assert message.startswith(f"{endpoint}/openai-community/gpt2/resolve/") and reason in message
    assert found("gpt2") == [] and capsys.readouterr().out == ""

    assert find("auto") == hub.MINI
    out = capsys.readouterr().out
    assert out.startswith(f"base: mini (gpt2 is not cached and {endpoint} ") and reason in out
    assert out.count("\n") == 1 and found("gpt2") == []


def test_auto_does_not_wait_for_a_hub_that_is_silent(fake, monkeypatch, capsys):
    too_late = threading.Event()

    def silent(url, seconds):
        too_late.wait()
        raise hub.HubError(url, "answers too late")

    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(hub, "_open", silent)
    assert find("auto") == hub.MINI
    too_late.set()
    reason = f"{fake.url} cannot be reached (no answer in 0.1 s)"
    assert capsys.readouterr().out == f"base: mini (gpt2 is not cached and {reason})\n"


def test_the_real_pins_are_whole():
    for size, digest in REAL_PINS.values():
        assert len(bytes.fromhex(digest)) == 32 and size != 0
    assert len(bytes.fromhex(hub.REVISIONS["gpt2"])) == 20
