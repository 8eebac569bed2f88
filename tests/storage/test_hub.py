"""Finds and downloads bases and adapters, from a server on this machine that answers as the hub."""

import hashlib
import importlib
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import evaluate
from common.errors import UserError
from storage import hub
from storage.weights import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from tests.runs import run, scores, stdout_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (WEIGHTS, PICKLED_WEIGHTS, "adapter_model.safetensors")  # kept by their sha256
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    """Answer as https://huggingface.co does: small files at once, large ones through a CDN."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        fake = self.server
        if self.path.startswith("/api/"):  # the library asks of itself
            return self.answer(404)
        fake.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/cdn/"):
            return self.send_file(fake.blobs[self.path.removeprefix("/cdn/")], {})
        repository, revision, file = RESOLVE.fullmatch(self.path).groups()
        if fake.status:
            return self.answer(fake.status)
        if fake.silence:
            return time.sleep(fake.silence)
        if repository not in fake.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if repository in fake.private and self.headers.get("Authorization") != "Bearer hf_mine":
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if repository in fake.gated:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", "v1", COMMIT, hub.GPT2_REVISION):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit = revision if len(revision) == 40 else COMMIT
        headers = {"X-Repo-Commit": commit}
        data = fake.repositories[repository].get(file)
        if data is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", **headers})
        if file not in LARGE:
            return self.send_file(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', **headers})
        sha256 = hashlib.sha256(data).hexdigest()
        fake.blobs[sha256] = fake.sent_instead or data
        linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        self.answer(
            302,
            {"Location": f"http://localhost:{fake.server_port}/cdn/{sha256}", **linked, **headers},
        )

    def send_file(self, data: bytes, headers: dict):
        """Send the file, or from where a Range asks; break off where the hub is to fail."""
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        part = data[first:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        if start:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        for field, value in headers.items():
            self.send_header(field, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.path.startswith("/cdn/") and self.server.cuts:
            self.server.cuts -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        if self.path.startswith("/cdn/"):
            self.server.sent.append(len(part))
        self.wfile.write(part)

    def answer(self, status: int, headers: dict | None = None):
        self.send_response(status)
        for field, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(field, value)
        self.end_headers()

    def log_message(self, *args):
        pass


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}  # OWNER/NAME -> file -> content
        self.blobs = {}
        self.private = set()
        self.gated = set()
        self.status = None  # of every answer
        self.silence = 0  # seconds without an answer
        self.cuts = 0  # downloads of large files that break off half-way
        self.sent_instead = b""  # of every large file
        self.requests = []
        self.sent = []  # bytes of each download of a large file

    def handle_error(self, request, client_address):
        """Say nothing of a client that went away."""


@pytest.fixture
def fake(tmp_path, monkeypatch, base):
    """A hub on this machine, with `base` as `someone/tiny`, and nothing of the user's."""
    for variable in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub, "CACHE", tmp_path / "project")
    with FakeHub() as fake:
        fake.repositories["someone/tiny"] = {
            path.name: path.read_bytes() for path in base.iterdir()
        } | {"README.md": b"not asked for"}
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        theirs = {name: sys.modules[name] for name in library_modules()}  # transformers' and PEFT's
        set_environment(monkeypatch, HF_ENDPOINT=fake.url)
        yield fake
        for name in library_modules():
            del sys.modules[name]
        sys.modules.update(theirs)
        fake.shutdown()


def set_environment(monkeypatch, **variables: str) -> None:
    """Set what huggingface_hub reads from the environment; `storage.hub` then imports it anew."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in library_modules():
        del sys.modules[name]


def library_modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]


def refusal(find=hub.find_base, base: str = "someone/tiny") -> str:
    with pytest.raises(UserError) as refused:
        find(base)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 600
    return message


def make_model(directory: Path, weights: str = WEIGHTS) -> Path:
    directory.mkdir(parents=True)
    (directory / weights).write_bytes(b"weights")
    (directory / CONFIG).write_bytes(b"{}")
    return directory


def test_a_repository_is_downloaded_once_and_scores_as_the_directory(fake, base, book, tmp_path):
    options = ("--text", book, "--block-size", 16)
    there = scores(tmp_path / "there.json", "--base", base, *options)[0]
    ending = run(evaluate.main, "--base", "someone/tiny", "--device", "cpu", *options)
    assert ending.status == 0 and f"{there['loss']:.4f}" in ending.stdout
    assert any("/cdn/" in request for request in fake.requests)

    name, directory = hub.find_base("someone/tiny")
    assert name == "someone/tiny" and directory.is_relative_to(tmp_path / "hf")
    assert {path.name for path in directory.iterdir()} == {
        CONFIG,
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
    }
    fake.requests.clear()
    assert hub.find_base("someone/tiny") == (name, directory)
    assert fake.requests == ["HEAD /someone/tiny/resolve/main/config.json"]  # is it still the same?


def test_pickled_weights_are_taken_where_there_are_no_others(fake):
    files = fake.repositories["someone/tiny"]
    files[PICKLED_WEIGHTS] = files.pop(WEIGHTS)
    directory = hub.find_base("someone/tiny@v1")[1]
    assert (directory / PICKLED_WEIGHTS).read_bytes() == files[PICKLED_WEIGHTS]
    del files[PICKLED_WEIGHTS]
    fake.repositories["someone/else"] = files
    assert "holds neither model.safetensors nor pytorch_model.bin" in refusal(base="someone/else")
    del files[CONFIG]
    fake.repositories["someone/odd"] = files
    assert "someone/odd: holds no config.json" in refusal(base="someone/odd")


@pytest.mark.parametrize("name", ["gpt2-xl", "distilgpt2"])
def test_a_base_known_by_name_needs_no_network_once_it_is_cached(fake, name):
    fake.repositories[hub.REPOSITORIES[name]] = fake.repositories["someone/tiny"]
    found, directory = hub.find_base(name)
    assert found == name and {path.name for path in directory.iterdir()} == {CONFIG, WEIGHTS}
    fake.requests.clear()
    assert hub.find_base(name) == (name, directory) and fake.requests == []


def test_a_cached_repository_is_used_without_a_network(fake, monkeypatch):
    directory = hub.find_base("someone/tiny")[1]
    set_environment(monkeypatch, HF_HUB_OFFLINE="1")
    fake.requests.clear()
    assert hub.find_base("someone/tiny") == ("someone/tiny", directory)
    assert "HF_HUB_OFFLINE is set" in refusal(base="someone/else")
    assert "HF_HUB_OFFLINE is set; place config.json and" in refusal(base="gpt2")
    assert fake.requests == []


def test_an_interrupted_download_is_taken_up_where_it_stopped(fake, monkeypatch):
    weights = fake.repositories["someone/tiny"][WEIGHTS]
    fake.cuts = 1
    chunk = 1000  # bytes; as large a file as a chunk is would make the test slow
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    try:
        directory = hub.find_base("someone/tiny")[1]
    except UserError as error:  # an older huggingface_hub takes it up in the next run only
        assert str(error).startswith("someone/tiny: cannot be had from") and "\n" not in str(error)
        directory = hub.find_base("someone/tiny")[1]
    assert (directory / WEIGHTS).read_bytes() == weights
    first, second = fake.sent
    assert len(weights) <= first + second < len(weights) + chunk


def test_weights_of_another_hash_are_refused_and_not_kept(fake, tmp_path):
    weights = fake.repositories["someone/tiny"][WEIGHTS]
    fake.sent_instead = weights[::-1]
    assert f"where {hashlib.sha256(weights).hexdigest()} is expected" in refusal()
    assert not [*(tmp_path / "hf").rglob(WEIGHTS)]
    fake.sent_instead = b""
    assert (hub.find_base("someone/tiny")[1] / WEIGHTS).read_bytes() == weights


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_gpt2_is_the_one_that_is_known(fake, tmp_path, file, capsys):
    """Whatever the server says of its files."""
    fake.repositories["openai-community/gpt2"] = fake.repositories["someone/tiny"]
    if file == WEIGHTS:  # the config is there, from an earlier download
        cache = tmp_path / "hf" / "hub" / "models--openai-community--gpt2"
        (make_model(cache / "snapshots" / hub.GPT2_REVISION) / WEIGHTS).unlink()
    message = refusal(base="gpt2")
    assert f"gpt2: {file} has sha256 " in message and hub.GPT2_SHA256[file] in message
    assert all(hub.GPT2_REVISION in r or "/cdn/" in r for r in fake.requests), fake.requests
    assert hub.find_base("auto") == ("mini", hub.MINI)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("base: mini (gpt2 is not cached and ") and "has sha256" in line


def test_a_private_repository_needs_a_token(fake, monkeypatch):
    fake.private.add("someone/tiny")
    message = refusal()
    assert (
        "no such repository at" in message and "log in (hf auth login) or set HF_TOKEN" in message
    )
    set_environment(monkeypatch, HF_TOKEN="hf_mine")
    assert hub.find_base("someone/tiny")[1].is_dir()
    fake.gated.add("someone/tiny")
    assert "asks" in refusal(base="someone/tiny@v1")


def test_what_is_not_there_is_refused_in_one_line(fake):
    assert "has no such revision" in refusal(base="someone/tiny@v2")
    assert "no such repository" in refusal(base="someone/nothing")
    assert "no such directory, and no" in refusal(base="runs/ful")
    for name in ("nowhere", "/no/where", "./no/where", "a/b/c", "-a/b", ""):
        assert refusal(base=name).startswith(f"--base {name!r}: no such directory, and none of")


def test_a_base_that_is_asked_for_is_refused_at_once_without_a_network(fake, monkeypatch):
    set_environment(monkeypatch, HF_ENDPOINT="http://127.0.0.1:1")
    for name in ("someone/tiny", "gpt2-large"):
        began = time.monotonic()
        assert "cannot be had from http://127.0.0.1:1 (Conn" in refusal(base=name)
        assert time.monotonic() - began < 5  # huggingface_hub would try six times, in 23 s


def test_a_directory_is_itself(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "mini", "auto", "mine", "someone/tiny"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("mine", "./gpt2", "someone/tiny", str(tmp_path / "mine")):
        assert hub.find_base(name) == (name, Path(name))
    assert hub.find_base("mini") == ("mini", hub.MINI)
    assert (fake.requests, *capsys.readouterr()) == ([], "", "")


@pytest.mark.parametrize(
    ("place", "weights"),
    [
        (f"hf/hub/models--openai-community--gpt2/snapshots/{hub.GPT2_REVISION}", WEIGHTS),
        (f"hf/hub/models--gpt2/snapshots/{hub.GPT2_REVISION}", PICKLED_WEIGHTS),
        ("project/gpt2", WEIGHTS),  # by hand
    ],
)
def test_gpt2_is_found_in_a_cache(fake, tmp_path, capsys, place, weights):
    directory = make_model(tmp_path / place, weights)
    assert hub.find_base("gpt2") == ("gpt2", directory)
    assert hub.find_base("auto") == ("gpt2", directory)
    assert capsys.readouterr().out == f"base: gpt2 (cached in {directory})\n"
    assert fake.requests == []
    (directory / weights).unlink()
    (directory / weights).symlink_to("../../blobs/0123")  # to nothing
    assert hub.find_base("auto")[0] == "mini"


AUTO = {
    "offline": ({"HF_HUB_OFFLINE": "1"}, {}, "HF_HUB_OFFLINE is set"),
    "closed port": ({"HF_ENDPOINT": "http://127.0.0.1:1"}, {}, "http://127.0.0.1:1 (Conn"),
    "no such host": ({"HF_ENDPOINT": "http://no.such.host.invalid"}, {}, "no.such.host.invalid"),
    "not an address": ({"HF_ENDPOINT": "127.0.0.1:1"}, {}, "127.0.0.1:1"),
    "silent": ({}, {"silence": 5}, "http"),
    "503": ({}, {"status": 503}, "503"),
    "a mirror without it": ({}, {}, "no such repository"),
}


@pytest.mark.parametrize("failure", AUTO)
def test_auto_is_mini_where_gpt2_cannot_be_had(fake, monkeypatch, capsys, failure):
    variables, faults, reason = AUTO[failure]
    vars(fake).update(faults)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    set_environment(monkeypatch, **variables)
    began = time.monotonic()
    assert hub.find_base("auto") == ("mini", hub.MINI)
    assert time.monotonic() - began < 1.5
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("base: mini (gpt2 is not cached and ") and reason in line
    assert not [*hub.CACHE.glob("*")]


def test_an_adapter_is_fetched_the_same_way(fake, adapter, base, book, monkeypatch):
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    fake.repositories["someone/adapter"] = {
        path.name: path.read_bytes() for path in adapter.iterdir()
    }
    directory = hub.find_adapter("someone/adapter@v1")
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert files == fake.repositories["someone/adapter"]
    options = ("--base", base, "--text", book, "--block-size", 16, "--device", "cpu")
    there = stdout_of(evaluate.main, *options, "--adapter", adapter)
    assert stdout_of(evaluate.main, *options, "--adapter", directory) == there
    for path in (adapter, "nowhere", "no/such/place"):
        assert hub.find_adapter(str(path)) == Path(path)
    assert "holds no adapter_config.json" in refusal(hub.find_adapter, "someone/tiny")
    del fake.repositories["someone/adapter"]["adapter_model.safetensors"]
    fake.repositories["someone/half"] = fake.repositories["someone/adapter"]
    assert "holds neither adapter_model" in refusal(hub.find_adapter, "someone/half")


def test_without_the_library_mini_and_what_is_placed_by_hand_work(fake, monkeypatch, capsys):
    missing = "huggingface_hub is not installed; pip install -e '.[hub]'"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "huggingface_hub", None)
        assert refusal() == missing and missing in refusal(base="gpt2")
        assert hub.find_base("auto") == ("mini", hub.MINI)
        assert capsys.readouterr().out == f"base: mini (gpt2 is not cached and {missing})\n"
        assert hub.find_base("mini") == ("mini", hub.MINI)
        directory = make_model(hub.CACHE / "gpt2-large")
        assert hub.find_base("gpt2-large") == ("gpt2-large", directory)


def test_mini_needs_neither_library():
    script = """
import sys, train, generate
from storage.hub import find_base
from data.tokenizer_files import load_tokenizer
load_tokenizer(find_base("mini")[1], 8192).encode("The sea")
sys.exit(bool({"huggingface_hub", "tokenizers"} & {*sys.modules}))
"""
    root = Path(hub.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
