"""The page's server: refusals, one computation at a time, and the shutdown."""

import json
import signal
import socket
import subprocess
import sys
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest

from lesson.explore import __main__ as command
from lesson.explore.explorer import MOST_NEW_TOKENS
from lora.save import save_adapter
from tests.explore.client import FULL, OPTIONS, PROMPT, TEXT
from tests.pairs import adapted
from tests.runs import one_line, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"Host": "lora.example:80"}, 403, "this server answers on 127.0.0.1:"),
        ({"Origin": "http://lora.example"}, 403, "answers its own page only"),
        ({"Content-Length": str(10**9)}, 413, "at most 65,536 are read"),
        ({"path": "/../README.md", "method": "GET"}, 404, "no such thing"),
        ({"body": "[" * 60_000}, 400, "is not JSON"),
        ({"text": ["a"]}, 200, "text: is empty"),
        ({"text": "\ud800"}, 200, "text: is not UTF-8 text"),
        ({"text": "é" * 40}, 200, "text: has 80 tokens; with"),
        ({"strength": 2.1}, 200, "strength: '2.1' is not a number from 0 to 2"),
        ({"rank": 4}, 200, "rank: '4' is not a whole number from 1 to 3"),
        ({"layers": ["h.9.attn.c_attn"]}, 200, "layers: is not a list"),
    ],
)
def test_a_request_that_is_foreign_wrong_or_too_large_is_refused_in_one_line(
    client, change, status, words
):
    change = dict(change)
    method = change.pop("method", "POST")
    path = change.pop("path", "/api/score")
    headers = {name: change.pop(name) for name in list(change) if name[0].isupper()}
    body = change.pop("body", None) or json.dumps(FULL | {"text": TEXT} | change)
    if "Content-Length" in headers:
        body = None  # not sent
    answered, _, text = client.send(method, path, body, **headers)
    assert answered == status
    assert words in json.loads(text)["error"] and text.count("\n") == 1
    assert client.scores()["mean_gain"] != 0  # the server still works


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt: is empty"),
        ({"max_new_tokens": MOST_NEW_TOKENS + 1}, "max_new_tokens: 401 is above 400"),
        ({"top_k": "5 --adapter x"}, "--top-k: '5 --adapter x' is not a whole number"),
    ],
)
def test_generations_options_are_refused_as_on_its_command_line(client, change, words):
    request = FULL | OPTIONS | {"prompt": PROMPT} | change
    status, _, text = client.send("POST", "/api/write", json.dumps(request))
    assert status == 200 and words in json.loads(text)["error"]  # other statuses fill a console


def test_requests_wait_for_each_other(client, monkeypatch):
    expected = client.texts()
    long = {}

    def write() -> None:
        long["texts"] = client.texts()

    thread = threading.Thread(target=write)
    thread.start()
    for strength in (0, 2, 0, 2):
        client.scores(strength=strength)
    thread.join()
    assert long["texts"] == expected

    monkeypatch.setattr(command, "PATIENCE", 0.01)
    with client.server.turn():
        status, _, text = client.send("POST", "/api/score", "{}")
    assert status == 503 and "another computation is still running" in text


def test_the_page_allows_itself_only_what_it_is(client):
    status, headers, page = client.send("GET", "/")
    assert status == 200 and page == command.PAGE.read_text()
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy and "unsafe" not in policy
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_command_refuses_in_one_line(base, every_layer, runs, tmp_path):
    def refused(adapter: Path, *options: object) -> str:
        return one_line(run(command.main, adapter, "--base", base, "--device", "cpu", *options), 2)

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(every_layer, "--port", port)
    used = f"--port {port}: cannot be used (Address already in use)"
    assert line == f"error: {used}; name another port"
    assert "is a whole model, whose change has no A and B" in refused(runs["full"].out)
    save_adapter(adapted(base, use_dora=True), tmp_path / "dora", "gpt2")
    assert "is DoRA, whose change is not B A alone" in refused(tmp_path / "dora", "--port", 0)
    assert "no such directory" in refused(tmp_path / "nothing", "--port", 0)


def test_the_command_serves_until_it_is_interrupted(base, every_layer):
    arguments = [every_layer, "--base", base, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lesson.explore", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        port = int(line.removeprefix("open http://127.0.0.1:").removesuffix(" (Ctrl-C ends)\n"))
        connection = HTTPConnection("localhost", port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.communicate() == ("", "")
    finally:
        process.kill()
