"""Find and download bases and adapters, from a local server that acts as the hub."""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import evaluate
import generate
from common.errors import UserError
from storage import hub
from storage.weights import CONFIG, WEIGHTS
from tests.runs import run, stdout_of, trained

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_FOUND = (401, {"X-Error-Code": "RepoNotFound"}, b"")  # as the hub answers


class FakeHub(ThreadingHTTPServer):
    """Answers like https://huggingface.co, without the CDN for large files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages = {}  # path -> status, headers and body
        self.delay = 0  # seconds before each answer
        self.requests = []

    def publish(self, name: str, files: dict[str, bytes], revision="main", commit=COMMIT):
        sizes = [{"type": "file", "path": file, "size": len(files[file])} for file in files]
        tree = [entry | {"oid": hashlib.sha1(files[entry["path"]]).hexdigest()} for entry in sizes]
        info = json.dumps({"id": name, "sha": commit, "siblings": []}).encode()
        self.pages[f"/api/models/{name}/revision/{revision}"] = (200, {}, info)
        self.pages[f"/api/models/{name}/tree/{commit}"] = (200, {}, json.dumps(tree).encode())
        for entry in tree:
            headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": commit}
            page = (200, headers, files[entry["path"]])
            for asked in (revision, commit):
                self.pages[f"/{name}/resolve/{asked}/{entry['path']}"] = page


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        time.sleep(self.server.delay)
        status, headers, body = self.server.pages.get(self.path.partition("?")[0], NOT_FOUND)
        self.send_response(status)
        for field, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(field, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def handle_one_request(self):
        with contextlib.suppress(BrokenPipeError):  # a client that gave up
            super().handle_one_request()

    def log_message(self, *args):
        pass


@pytest.fixture
def fake(tmp_path, monkeypatch, base):
    """A hub on this machine, with `base` as `someone/tiny@v1`, and without the user's settings."""
    for variable in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("no_proxy", "*")
    others = {name: sys.modules[name] for name in library_modules()}  # PEFT uses these
    with FakeHub() as fake:
        fake.publish("someone/tiny", contents(base) | {"README.md": b"not asked for"}, "v1")
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{fake.server_port}"
        set_environment(monkeypatch, HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=url)
        yield fake
        set_environment(monkeypatch)
        sys.modules.update(others)
        fake.shutdown()


def set_environment(monkeypatch, **variables: str) -> None:
    """Set the variables that huggingface_hub reads. `storage.hub` then imports it again."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in library_modules():
        del sys.modules[name]


def library_modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def refusal(base: str) -> str:
    with pytest.raises(UserError) as refused:
        hub.find_base(base)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 600
    return message


def test_an_adapter_names_the_repository_and_the_revision_of_its_base(fake, base, book, tmp_path):
    trained("lora", "someone/tiny@v1", book, tmp_path / "out", "--max-steps", 1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", "v1")
    there = contents(hub.find_base("someone/tiny@v1")[1])
    assert CONFIG in there and "README.md" not in there and there.items() <= contents(base).items()
    options = ("--max-new-tokens", 2, "--device", "cpu", "--prompt", "You")
    assert run(generate.main, *options, "--adapter", tmp_path / "out").status == 0


def test_an_adapter_on_the_hub_scores_as_its_directory(fake, adapter, base, book, monkeypatch):
    fake.publish("someone/adapter", contents(adapter))
    options = ("--base", base, "--text", book, "--block-size", 16, "--device", "cpu")
    there = run(evaluate.main, *options, "--adapter", "someone/adapter")
    assert there.stdout == stdout_of(evaluate.main, *options, "--adapter", adapter)
    monkeypatch.chdir(adapter.parent)
    Path("someone").mkdir()  # so the name is a path
    assert hub.find_adapter("someone/adapter") == Path("someone/adapter")


def test_a_cached_repository_is_used_offline(fake, base, monkeypatch):
    fake.publish("openai-community/gpt2-medium", contents(base))
    found = {name: hub.find_base(name) for name in ("someone/tiny@v1", "gpt2-medium")}
    fake.requests.clear()
    set_environment(monkeypatch, HF_HUB_OFFLINE="1")
    assert {name: hub.find_base(name) for name in found} == found
    assert "HF_HUB_OFFLINE" in refusal("someone/else") and "HF_HUB_OFFLINE" in refusal("gpt2")
    assert fake.requests == []


def test_another_gpt2_than_the_known_one_is_refused_and_not_kept(fake, base, monkeypatch):
    """The hashes that the server names fit the files that it sends."""
    files, revision = contents(base), hub.GPT2_REVISION
    fake.publish("openai-community/gpt2", files, revision, commit=revision)
    known = {name: hashlib.sha256(files[name]).hexdigest() for name in hub.GPT2_SHA256}
    monkeypatch.setattr(hub, "GPT2_SHA256", known | {WEIGHTS: "0" * 64})
    for _ in range(2):
        assert f"gpt2: {WEIGHTS} has sha256 {known[WEIGHTS]}, and not {'0' * 64}" in refusal("gpt2")
    monkeypatch.setattr(hub, "GPT2_SHA256", known)
    assert contents(hub.find_base("gpt2")[1]) == {name: files[name] for name in (CONFIG, WEIGHTS)}


def test_each_way_in_which_a_download_fails_is_one_line(fake, base, monkeypatch):
    assert refusal("nuns/ful").startswith("nuns/ful is neither a directory nor available on the")
    gated = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access."}, b"")
    fake.publish("someone/gated", contents(base))
    fake.pages[f"/someone/gated/resolve/{COMMIT}/{WEIGHTS}"] = gated
    assert "GatedRepoError" in refusal("someone/gated")
    fake.publish("someone/shards", {f"{WEIGHTS}.index.json": b"{}"})
    assert "sharded weights are not supported" in refusal("someone/shards")
    set_environment(monkeypatch, HF_ENDPOINT="http://127.0.0.1:1")
    began = time.monotonic()
    assert "Connect" in refusal("someone/tiny") and "Connect" in refusal("gpt2")
    assert time.monotonic() - began < 5  # huggingface_hub would try six times, in 23 s


def test_auto_is_mini_where_the_hub_does_not_answer(fake, capsys):
    fake.delay = 5
    began = time.monotonic()
    assert hub.find_base("auto") == ("mini", hub.MINI)
    assert time.monotonic() - began < 3
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("base: mini (gpt2 is not cached, and ") and "Timeout" in line


def test_a_directory_is_itself_and_a_mistyped_one_asks_for_nothing(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("someone/tiny").mkdir(parents=True)
    assert hub.find_base("someone/tiny") == ("someone/tiny", Path("someone/tiny"))
    for name in ("someone/else", "/no/where", "a/b/c", ""):
        assert refusal(name).startswith(f"--base {name!r}: no such directory, and none of")
    assert fake.requests == []


def test_without_the_library_mini_works(fake, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "huggingface_hub", None)
        assert hub.find_base("auto") == hub.find_base("mini") == ("mini", hub.MINI)
        assert "huggingface_hub is not installed; pip install" in refusal("gpt2")
