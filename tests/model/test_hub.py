"""Finds and downloads a base, against a hub of our own that can misbehave in every way."""

import hashlib
import itertools
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model import hub
from tests.helpers import refusal

REAL_SHA256 = dict(hub.SHA256)
WEIGHTS = os.urandom(300_000)
CONFIG = b'{"model_type": "gpt2"}'
FILES = {hub.WEIGHTS: WEIGHTS, hub.CONFIG: CONFIG}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Weights: the hub's 302 with the X-Linked headers, then a CDN without, which sends on to
    another place. Config: at once.
    """

    def do_GET(self):
        fake = self.server
        fake.requests.append(self.path)
        file = self.path.rsplit("/", 1)[-1]
        cdn = self.path.startswith("/cdn/")
        linked = fake.linked if file == hub.WEIGHTS and not cdn else {}
        if linked and fake.redirects:
            return self.answer(302, b"", {"Location": f"/cdn/old/{file}", **linked})
        if "/old/" in self.path:
            return self.answer(308, b"", {"Location": f"/cdn/{file}"})
        fault = next(fake.faults.get(file, iter(())), None)
        if fault == "no answer":
            return
        if isinstance(fault, int):
            return self.send_error(fault)
        self.answer(200, fake.files[file], linked, fault)

    def answer(self, status: int, body: bytes, headers: dict, fault: str | None = None):
        self.send_response(status)
        if self.server.says_length:
            headers = {"Content-Length": str(len(body)), **headers}
        for field, value in headers.items():
            self.send_header(field, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault else body)
        if fault == "stall":
            time.sleep(0.5)

    def log_message(self, *args):
        pass


class FakeHub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = dict(FILES)
        self.linked = {"X-Linked-ETag": f'"{sha256(WEIGHTS)}"'}
        self.faults = {}  # file -> iterator of one fault (or None) a request
        self.says_length = self.redirects = True
        self.requests = []

    def asked(self, name: str, file: str, revision: str = "main") -> str:
        return f"{self.url}/openai-community/{name}/resolve/{revision}/{file}"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A hub on this machine, and nothing of the user's: no home, no cache, no proxy."""
    theirs = ("HF_", "HUGGINGFACE_", "XDG_CACHE_")
    for variable in [name for name in os.environ if name.startswith(theirs)]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub, "CACHE", tmp_path / "project" / "hub")
    monkeypatch.setattr(hub, "WAITS", (0, 0))
    monkeypatch.setattr(hub, "SHA256", {})
    with FakeHub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        fake.shutdown()


def make_model(directory: Path, weights: str = hub.WEIGHTS) -> Path:
    directory.mkdir(parents=True)
    (directory / weights).write_bytes(b"weights")
    (directory / hub.CONFIG).write_bytes(b"{}")
    return directory


def found(name: str) -> list[str]:
    """All the files that a download of `name` has left, temporary ones included."""
    return sorted(path.name for path in (hub.CACHE / name).rglob("*") if path.is_file())


def find(base: str) -> Path:
    """The directory, once the name is seen to be the one asked for or the one `auto` took."""
    name, directory = hub.find_base(base)
    taken = "mini" if directory == hub.MINI else "gpt2"
    assert name == (taken if base == "auto" else base)
    return directory


def test_a_directory_is_itself_and_shadows_no_base(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "mini", "auto", "mine"):
        (tmp_path / name).mkdir()
    assert find("mine") == Path("mine") and find("./gpt2") == Path("gpt2")
    assert find(str(tmp_path / "mine")) == tmp_path / "mine"
    assert find("mini") == Path(hub.__file__).parent / "mini"
    assert (fake.requests, *capsys.readouterr()) == ([], "", "")
    assert find("auto") == hub.CACHE / "gpt2"
    assert capsys.readouterr().out == f"base: gpt2 (downloaded from {fake.url})\n"
    assert find("gpt2") == hub.CACHE / "gpt2"


@pytest.mark.parametrize(
    ("variable", "value", "directory", "weights"),
    [
        ("HF_HUB_CACHE", "{}/hub", "hub/models--openai-community--gpt2/snapshots/a", hub.WEIGHTS),
        ("HUGGINGFACE_HUB_CACHE", "{}/$HF_X/hub", "x/hub/models--gpt2/snapshots/a", hub.WEIGHTS),
        ("HF_HOME", "{}/hf", "hf/hub/models--gpt2/snapshots/a", "pytorch_model.bin"),
        ("HF_HOME", "", "home/.cache/huggingface/hub/models--gpt2/snapshots/a", hub.WEIGHTS),
        (
            "XDG_CACHE_HOME",
            "{}/xdg",
            "xdg/huggingface/hub/models--openai-community--gpt2/snapshots/a",
            "pytorch_model.bin",
        ),
        ("HF_HUB_OFFLINE", "1", "project/hub/gpt2", hub.WEIGHTS),  # the project's own
    ],
)
def test_found_in_a_cache(fake, tmp_path, monkeypatch, capsys, variable, value, directory, weights):
    monkeypatch.setenv(variable, value.format(tmp_path))
    monkeypatch.setenv("HF_X", "x")
    model = make_model(tmp_path / directory, weights)
    assert find("gpt2") == model
    assert (fake.requests, *capsys.readouterr()) == ([], "", "")
    assert find("auto") == model
    assert (fake.requests, capsys.readouterr().out) == ([], f"base: gpt2 (cached in {model})\n")


def test_a_cache_that_cannot_be_read_is_done_without(fake, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", 300 * "x")  # as where it is another user's
    assert find("gpt2") == hub.CACHE / "gpt2"


def test_the_main_revision_comes_first_and_only_whole_snapshots_count(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--openai-community--gpt2"
    a, b, c = (make_model(repository / "snapshots" / revision) for revision in "abc")
    make_model(hub.CACHE / "gpt2")  # the project's own cache comes last
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b\n")
    assert find("gpt2") == b
    (b / hub.WEIGHTS).unlink()  # as on the hub: a link into blobs/
    (b / hub.WEIGHTS).symlink_to("../../blobs/0123")
    assert find("gpt2") == a
    (a / hub.CONFIG).unlink()
    assert find("gpt2") == c
    (repository / "blobs").mkdir()
    (repository / "blobs" / "0123").write_bytes(b"weights")
    assert find("gpt2") == b


@pytest.mark.parametrize(
    ("name", "revision"),
    [("gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"), ("gpt2-xl", "main")],
)
def test_a_download_is_whole_and_asked_for_once(fake, name, revision, capsys):
    directory = find(name)
    assert directory == hub.CACHE / name and found(name) == [hub.CONFIG, hub.WEIGHTS]
    assert (directory / hub.WEIGHTS).read_bytes() == WEIGHTS
    assert (directory / hub.CONFIG).read_bytes() == CONFIG
    weights, config = (f"/openai-community/{name}/resolve/{revision}/{file}" for file in fake.files)
    cdn = ["/cdn/old/model.safetensors", "/cdn/model.safetensors"]
    assert fake.requests == [weights, *cdn, config]
    output = capsys.readouterr()
    assert output.out == "" and f"{name}/{hub.WEIGHTS}: 100%" in output.err
    assert find(name) == directory and len(fake.requests) == 4


@pytest.mark.parametrize(("file", "fault"), [(hub.WEIGHTS, "cut"), (hub.CONFIG, 503)])
def test_a_passing_fault_is_tried_again(fake, file, fault):
    fake.faults[file] = iter([fault])
    assert (find("gpt2-medium") / file).read_bytes() == fake.files[file]
    assert found("gpt2-medium") == [hub.CONFIG, hub.WEIGHTS]


@pytest.mark.parametrize("feature", ["says_length", "redirects"])
def test_a_mirror_may_say_no_lengths_or_serve_the_weights_itself(fake, feature):
    setattr(fake, feature, False)
    assert (find("gpt2-medium") / hub.WEIGHTS).read_bytes() == WEIGHTS
    assert any("cdn" in path for path in fake.requests) == fake.redirects


def test_a_later_run_takes_up_where_one_stopped(fake):
    fake.faults[hub.CONFIG] = itertools.repeat("cut", 3)
    refusal(fake.asked("gpt2-large", hub.CONFIG), hub.find_base, "gpt2-large")
    assert found("gpt2-large") == [hub.WEIGHTS]  # whole, but no model without a config
    fake.requests.clear()
    assert find("gpt2-large") == hub.CACHE / "gpt2-large"
    assert fake.requests == ["/openai-community/gpt2-large/resolve/main/config.json"]


def broken(fault, *files):
    return {"faults": {file: itertools.repeat(fault) for file in (hub.WEIGHTS, *files)}}


GPT2 = ("gpt2", hub.WEIGHTS)
LOOP = {"Location": f"/openai-community/gpt2/resolve/main/{hub.WEIGHTS}"}
FAILURES = {  # what is changed, how the message says so, and how often the hub is asked for weights
    "stalled": ({**broken("stall"), "SOCKET_SECONDS": 0.2}, "was cut (timed out)", 3),
    "no answer": (broken("no answer"), "was cut (Remote end closed connection", 3),
    "503": (broken(503), "answers 503", 3),
    "404": (broken(404), "answers 404", 1),
    "bytes": ({"files": {**FILES, hub.WEIGHTS: WEIGHTS[::-1]}}, f"where {sha256(WEIGHTS)} is", 1),
    "cut": (broken("cut"), "after 150,000 of 300,000 bytes", 3),
    "pinned hash": ({"SHA256": {GPT2: "0" * 64}}, f"where {'0' * 64} is expected", 1),
    "git hash": ({"linked": {"X-Linked-ETag": f'"{"0" * 40}"'}}, "no sha256", 1),
    "loop": ({"linked": LOOP}, "infinite loop", None),  # urllib's own message has three lines
    "closed port": ({"HF_ENDPOINT": "http://127.0.0.1:1/"}, "refused", 0),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", 0),
    "not an address": ({"HF_ENDPOINT": "127.0.0.1:1"}, "unknown url type", 0),
    "not a port": ({"HF_ENDPOINT": "http://127.0.0.1:port"}, "port", 0),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_leaves_nothing(fake, monkeypatch, capsys, failure):
    changes, reason, tries = FAILURES[failure]
    for name, value in changes.items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.setattr(hub if name.isupper() else fake, name, value)
    fake.url = os.environ["HF_ENDPOINT"].rstrip("/")
    asked = fake.asked("gpt2", hub.WEIGHTS, hub.REVISIONS["gpt2"])
    blamed = fake.url if tries == 0 else asked
    message = refusal(f"{blamed} ", hub.find_base, "gpt2")
    assert reason in message
    for advice in (str(hub.CACHE / "gpt2"), "HF_ENDPOINT", "--base mini"):
        assert advice in message
    if tries is not None:
        assert sum(path in asked for path in fake.requests) == tries
    assert found("gpt2") == [] and capsys.readouterr().out == ""

    assert find("auto") == hub.MINI
    out = capsys.readouterr().out
    assert out.startswith(f"base: mini (gpt2 is not cached and {blamed} ") and reason in out
    assert out.count("\n") == 1 and found("gpt2") == []


def test_a_config_that_is_not_the_pinned_one_is_refused(fake, monkeypatch):
    monkeypatch.setattr(hub, "SHA256", REAL_SHA256 | {GPT2: sha256(WEIGHTS)})
    asked = fake.asked("gpt2", hub.CONFIG, hub.REVISIONS["gpt2"])
    assert f"where {REAL_SHA256['gpt2', hub.CONFIG]} is" in refusal(asked, hub.find_base, "gpt2")
    assert found("gpt2") == [hub.WEIGHTS]


def test_a_cache_that_cannot_be_written(fake, capsys):
    hub.CACHE.parent.mkdir()
    hub.CACHE.write_text("a file where the directory should be")
    refusal(hub.CACHE / "gpt2" / hub.WEIGHTS, hub.find_base, "gpt2")
    assert find("auto") == hub.MINI
    assert str(hub.CACHE / "gpt2" / hub.WEIGHTS) in capsys.readouterr().out


def test_auto_does_not_wait_for_a_hub_that_is_silent(fake, monkeypatch, capsys):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(hub, "_open", lambda url: threading.Event().wait())
    assert find("auto") == hub.MINI
    reason = f"{fake.url} cannot be reached (no answer in 0.1 s)"
    assert capsys.readouterr().out == f"base: mini (gpt2 is not cached and {reason})\n"
