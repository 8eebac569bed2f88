"""Serve the page of `make explore` inside this process, and send requests."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from common.device import Device
from lesson.explore.__main__ import Server
from lesson.explore.explorer import Explorer

LAYERS = [
    f"h.{i}.{name}"
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
FULL = {"strength": 1, "rank": 3, "layers": LAYERS}
OPTIONS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5, "max_new_tokens": 25}
PROMPT = "-You climb “the stair” <b>"  # like an option and markup; characters of several tokens
TEXT = "The keeper turns “naïve”."


class Client:
    """A client of a page's server. Tests read `explorer` and `port`."""

    def __init__(self, server: Server):
        self.server = server
        self.explorer = server.explorer
        self.port = server.port

    def send(self, method: str, path: str, body: str | None = None, **headers: str):
        """Return the answer's status, headers and text."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, text

    def ask(self, what: str, **request: object) -> list[dict]:
        """Return the lines of an answer to a good request."""
        status, _, text = self.send("POST", f"/api/{what}", json.dumps(FULL | OPTIONS | request))
        assert status == 200, text
        return [json.loads(line) for line in text.splitlines()]

    def texts(self, **request: object) -> list[str]:
        """Return the texts of the base and the adapter after PROMPT, which is included."""
        *pieces, end = self.ask("write", prompt=PROMPT, **request)
        assert end == {"done": True}
        rows = [PROMPT, PROMPT]
        for piece in pieces:
            rows[piece["row"]] += piece["text"]
        return rows

    def scores(self, **request: object) -> dict:
        [answer] = self.ask("score", **{"text": TEXT, **request})
        return answer


@contextmanager
def serving(base: Path, adapter: Path, quantise: str | None = None) -> Iterator[Client]:
    with Server(0) as server:
        server.explorer = Explorer(str(base), adapter, Device.pick("cpu"), quantise)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()
