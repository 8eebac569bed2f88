"""Find and download bases and adapters, from a local server that acts as the hub."""

import hashlib
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import evaluate
import generate
from adapters.load import named_base
from common.errors import UserError
from storage import hub
from storage.weights import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from tests.helpers import tiny_gpt2_directory
from tests.runs import one_line, run, scores, stdout_of, trained

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+)")


class Handler(BaseHTTPRequestHandler):
    """Answers like https://huggingface.co, without the CDN for large files."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        fake = self.server
        asked = RESOLVE.fullmatch(self.path) or API.match(self.path)
        if asked is None:  # a request of the library
            return self.answer(404)
        fake.requests.append(f"{self.command} {self.path}")
        if fake.status:
            return self.answer(fake.status, {"X-Error-Message": fake.reason})
        if fake.silence:
            return time.sleep(fake.silence)
        if self.path.startswith("/api/"):
            repository, kind, revision = asked.groups()
        else:
            repository, revision, kind = asked.groups()
        if repository not in fake.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", COMMIT, hub.GPT2_REVISION):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit = revision if len(revision) == 40 else COMMIT
        files = fake.repositories[repository]
        if self.path.startswith("/api/"):
            return self.send_list(kind, repository, commit, files)
        if kind not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[kind]
        self.send_file(data, {"ETag": f'"{sha1(data)}"', "X-Repo-Commit": commit})

    def send_list(self, kind: str, repository: str, commit: str, files: dict):
        """Answer the library's two requests that list a repository's files."""
        if kind == "revision":
            names = [{"rfilename": name} for name in files]
            listed = {"id": repository, "sha": commit, "siblings": names}
        else:
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data)}
                for name, data in files.items()
            ]
        self.send_file(json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def send_file(self, data: bytes, headers: dict):
        self.send_response(200)
        for field, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(field, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

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
        self.status = None  # of every answer
        self.reason = "An error."  # the server's sentence with this status
        self.silence = 0  # seconds without an answer
        self.requests = []

    def handle_error(self, request, client_address):
        """Ignore a client that disconnected."""


@pytest.fixture
def fake(tmp_path, monkeypatch, base):
    """A hub on this machine, with `base` as `someone/tiny`, and without the user's settings."""
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
        others = {name: sys.modules[name] for name in library_modules()}  # PEFT uses these
        set_environment(monkeypatch, HF_ENDPOINT=fake.url)
        yield fake
        for name in library_modules():
            del sys.modules[name]
        sys.modules.update(others)
        fake.shutdown()


def set_environment(monkeypatch, **variables: str) -> None:
    """Set the variables that huggingface_hub reads. `storage.hub` then imports it again."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in library_modules():
        del sys.modules[name]


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


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


def test_a_repository_is_downloaded_and_scores_as_the_directory(fake, base, book, tmp_path):
    fake.repositories["someone/tiny"]["chat_template.jinja"] = b"{{ messages }}"
    options = ("--text", book, "--block-size", 16)
    there = scores(tmp_path / "there.json", "--base", base, *options)[0]
    ending = run(evaluate.main, "--base", "someone/tiny", "--device", "cpu", *options)
    assert ending.status == 0 and f"{there['loss']:.4f}" in ending.stdout

    name, directory = hub.find_base("someone/tiny")
    assert name == "someone/tiny" and directory.is_relative_to(tmp_path / "hf")
    assert {path.name for path in directory.iterdir()} == {
        CONFIG,
        WEIGHTS,
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_adapter_names_the_repository_and_the_revision_of_its_base(fake, book, tmp_path):
    trained("lora", "someone/tiny@v1", book, tmp_path, "--max-steps", 1)
    assert named_base(tmp_path) == "someone/tiny@v1"
    fake.requests.clear()
    options = ("--max-new-tokens", 2, "--device", "cpu", "--prompt", "You")
    assert run(generate.main, *options, "--adapter", tmp_path).status == 0
    assert all("v1" in request for request in fake.requests if "/revision/" in request)
    other, _ = tiny_gpt2_directory(tmp_path / "other", seed=1)
    refused = run(generate.main, *options, "--adapter", tmp_path, "--base", other)
    assert "use that base, 'someone/tiny@v1'" in one_line(refused, 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", "v1")
    assert 'revision="v1"' in (tmp_path / "README.md").read_text()


def test_a_cached_repository_is_used_without_a_network(fake, monkeypatch):
    fake.repositories[hub.REPOSITORIES["distilgpt2"]] = fake.repositories["someone/tiny"]
    found = {name: hub.find_base(name) for name in ("someone/tiny", "distilgpt2")}
    fake.requests.clear()
    assert hub.find_base("distilgpt2") == found["distilgpt2"] and fake.requests == []
    set_environment(monkeypatch, HF_HUB_OFFLINE="1")
    assert hub.find_base("someone/tiny") == found["someone/tiny"]
    for name in ("someone/else", "gpt2"):
        assert "HF_HUB_OFFLINE" in refusal(base=name)
    assert fake.requests == []


def test_another_gpt2_than_the_known_one_is_refused_and_not_kept(fake, monkeypatch):
    """The server's hashes fit the files that it sends."""
    file = WEIGHTS
    files = fake.repositories["openai-community/gpt2"] = fake.repositories["someone/tiny"]
    known = {name: hashlib.sha256(files[name]).hexdigest() for name in hub.GPT2_SHA256}
    monkeypatch.setattr(hub, "GPT2_SHA256", {**known, file: "0" * 64})
    for _ in range(2):
        message = refusal(base="gpt2")
        assert f"gpt2: {file} has sha256 {known[file]}, and not {'0' * 64}" in message
        assert hub.find_base("auto") == ("mini", hub.MINI)
    monkeypatch.setattr(hub, "GPT2_SHA256", known)
    assert (hub.find_base("gpt2")[1] / file).read_bytes() == files[file]
    assert all(hub.GPT2_REVISION in request for request in fake.requests)


def test_what_is_not_there_is_refused_in_one_line(fake, monkeypatch, tmp_path):
    message = refusal(base="someone/tiny@v2")
    assert message.startswith("someone/tiny@v2 is neither a directory nor available on the hub: ")
    assert "RevisionNotFoundError" in message and "/someone/tiny/revision/v2" in message
    fake.status, fake.reason = 403, "You are not on the list of someone/tiny."
    assert fake.reason in refusal(base="someone/tiny")
    fake.status = None
    for find in (hub.find_base, hub.find_adapter):
        assert refusal(find, "nuns/ful").startswith("nuns/ful is neither a directory nor available")
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()  # so runs/ful is a path, and no request is sent
    assert refusal(base="runs/ful").startswith("--base 'runs/ful': no such directory")
    assert hub.find_adapter("runs/ful") == Path("runs/ful")
    for name in ("nowhere", "/no/where", "./no/where", "a/b/c", "-a/b", ""):
        assert refusal(base=name).startswith(f"--base {name!r}: no such directory, and none of")


def test_a_base_that_is_named_is_refused_at_once_without_a_network(fake, monkeypatch):
    set_environment(monkeypatch, HF_ENDPOINT="http://127.0.0.1:1")
    began = time.monotonic()
    for name in ("someone/tiny", "gpt2"):
        assert "Connect" in refusal(base=name)
    assert time.monotonic() - began < 5  # huggingface_hub would try six times, in 23 s


def test_a_directory_is_itself(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "mini", "auto", "mine", "someone/tiny"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("mine", "./gpt2", "someone/tiny", str(tmp_path / "mine")):
        assert hub.find_base(name) == (name, Path(name))
    assert hub.find_base("mini") == ("mini", hub.MINI)
    assert hub.find_adapter("someone/tiny") == Path("someone/tiny")
    (tmp_path / "someone" / "tiny@v2").mkdir()
    assert hub.split_revision("someone/tiny@v2") == ("someone/tiny@v2", None)
    assert hub.split_revision("someone/other@v2") == ("someone/other", "v2")
    assert (fake.requests, *capsys.readouterr()) == ([], "", "")


def test_gpt2_is_found_in_a_cache(fake, tmp_path, capsys):
    place = f"hf/hub/models--gpt2/snapshots/{hub.GPT2_REVISION}"
    directory = make_model(tmp_path / place, PICKLED_WEIGHTS)
    assert hub.find_base("gpt2") == ("gpt2", directory)
    assert hub.find_base("auto") == ("gpt2", directory)
    assert capsys.readouterr().out == f"base: gpt2 (cached in {directory})\n"
    assert fake.requests == []
    (directory / PICKLED_WEIGHTS).unlink()
    assert hub.find_base("auto")[0] == "mini"


def test_auto_is_mini_where_the_hub_does_not_answer(fake, capsys):
    fake.silence = 5
    began = time.monotonic()
    assert hub.find_base("auto") == ("mini", hub.MINI)
    assert time.monotonic() - began < 3
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("base: mini (gpt2 is not cached, and openai-community/gpt2")
    assert "Timeout" in line


def test_shards_and_an_adapter_in_place_of_a_base_are_named(fake, base, adapter):
    files = fake.repositories["someone/tiny"]
    fake.repositories["someone/shards"] = files | {f"{WEIGHTS}.index.json": b"{}"}
    del fake.repositories["someone/shards"][WEIGHTS]
    message = refusal(base="someone/shards")
    assert f"{WEIGHTS}.index.json: sharded weights are not supported; save one" in message
    fake.repositories["someone/adapter"] = {p.name: p.read_bytes() for p in adapter.iterdir()}
    ending = run(generate.main, "--base", "someone/adapter", "--prompt", "You", "--device", "cpu")
    assert "is an adapter, not a base; give it to --adapter" in ending.stderr


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
    ending = run(evaluate.main, *options, "--adapter", "someone/tiny")  # a base, not an adapter
    assert ending.status == 2 and "no such directory; name an adapter" in ending.stderr


def test_without_the_library_mini_and_what_is_placed_by_hand_work(fake, monkeypatch, capsys):
    missing = "huggingface_hub is not installed; pip install -e '.[hub]'"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "huggingface_hub", None)
        assert refusal() == missing and missing in refusal(base="gpt2")
        assert hub.find_base("auto") == ("mini", hub.MINI)
        assert capsys.readouterr().out == f"base: mini (gpt2 is not cached, and {missing})\n"
        assert hub.find_base("mini") == ("mini", hub.MINI)
        directory = make_model(hub.CACHE / "gpt2-large")
        assert hub.find_base("gpt2-large") == ("gpt2-large", directory)
