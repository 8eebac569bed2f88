"""Show on a web page what an adapter learned: `python -m lesson.explore runs/lora`."""

import argparse
import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from itertools import chain
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

from adapters.factors import refuse_model
from common.cli import BASE_OPTION, QUANTISE_OPTION, Parser, add_device_options, number
from common.device import Device, tune_process
from common.errors import UserError, describe_failure, run_command
from lesson.explore.explorer import Explorer

PAGE = Path(__file__).with_name("page.html")
ADDRESS = "127.0.0.1"  # other machines cannot connect
MOST_BYTES = 1 << 16  # per request
PATIENCE = 60  # seconds that a request waits for the previous request


class Refusal(UserError):
    """A refused request, with its HTTP status. A plain UserError, such as a wrong entry in a field,
    has status 200, because browsers log any other status as an error of the page.
    """

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


class Server(ThreadingTCPServer):
    """Answer on `ADDRESS`, one computation at a time. Raises UserError for a port in use."""

    allow_reuse_address = True
    daemon_threads = True
    explorer: Explorer

    def __init__(self, port: int):
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be used ({error.strerror}); name another port"
            ) from error
        self.port = self.server_address[1]  # the chosen port, if 0 was requested
        self.computing = threading.Lock()
        self.page = PAGE.read_bytes()
        self.policy = content_policy(self.page.decode())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the previous computation. Raises Refusal if that takes too long."""
        if not self.computing.acquire(timeout=PATIENCE):
            raise Refusal(503, "another computation is still running; try again")
        try:
            yield
        finally:
            self.computing.release()

    def handle_error(self, *request: Any) -> None:
        """Print the traceback of a bug. A closed page is not a bug."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*request)


def content_policy(page: str) -> str:
    """Return a Content-Security-Policy. The policy allows the page's script and style, by their
    hashes, and requests to this server. The policy blocks everything else, such as scripts in a
    text.
    """
    sources = {}
    for tag in ("script", "style"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources[tag] = f"'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


class Handler(BaseHTTPRequestHandler):
    """Answer one request. Answers to POST are lines of JSON, in the order of computation."""

    server: Server
    timeout = 10  # seconds to wait for a client that neither sends nor reads

    def do_GET(self) -> None:
        self.answer({"/": self.send_page, "/api/about": self.send_about})

    def do_POST(self) -> None:
        self.answer({"/api/write": self.send_writing, "/api/score": self.send_scores})

    def answer(self, routes: Mapping[str, Callable[[], None]]) -> None:
        """Call the function of the path. After a failure, answer with one line."""
        self.began = False
        try:
            self.refuse_foreigners()
            if self.path not in routes:
                raise Refusal(404, f"{self.command} {self.path}: there is no such thing here")
            routes[self.path]()
        except (ConnectionError, TimeoutError):
            raise  # the browser has closed the connection, so nobody would read an error
        except Exception as error:
            line = describe_failure(error)
            self.send_failure(error, line or f"a bug of this server: {type(error).__name__}")
            if line is None:
                raise  # the server prints the traceback

    def refuse_foreigners(self) -> None:
        """Raise Refusal for a request by a page of another host. Browsers send this host as Origin.

        With DNS rebinding, a foreign host name resolves to this machine. Browsers then send the
        foreign name as Host.
        """
        port = "" if self.server.port == 80 else f":{self.server.port}"  # browsers omit port 80
        hosts = [f"{ADDRESS}{port}", f"localhost{port}"]
        if self.headers.get("Host") not in hosts:
            raise Refusal(403, f"this server answers on {hosts[0]} and {hosts[1]} only")
        origin = self.headers.get("Origin")  # only browsers send Origin
        if origin is not None and origin.removeprefix("http://") not in hosts:
            raise Refusal(403, "this server answers its own page only")

    def send_page(self) -> None:
        self.begin(200, "text/html; charset=utf-8")
        self.wfile.write(self.server.page)

    def send_about(self) -> None:
        self.send_lines([self.server.explorer.about()])

    def send_writing(self) -> None:
        request = self.read_request()
        with self.server.turn(), closing(self.server.explorer.write(request)) as pieces:
            self.send_lines(chain(pieces, [{"done": True}]))

    def send_scores(self) -> None:
        request = self.read_request()
        with self.server.turn():
            scores = self.server.explorer.score(request)
        self.send_lines([scores])

    def read_request(self) -> dict[str, Any]:
        """Return the body, a JSON object. Raises Refusal for any other body."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refusal(411, "the request has no valid Content-Length")
        if int(length) > MOST_BYTES:
            raise Refusal(413, f"the request has {length} bytes; at most {MOST_BYTES:,} are read")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the request is not JSON ({error})") from error
        if not isinstance(request, dict):
            raise Refusal(400, "the request is not a JSON object")
        return request

    def send_lines(self, answers: Iterable[dict[str, Any]]) -> None:
        """Send each answer at once. A failure before the first answer sets the status."""
        for answer in answers:
            if not self.began:
                self.begin(200, "application/x-ndjson")
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def send_failure(self, error: Exception, line: str) -> None:
        if not self.began:
            status = 200 if isinstance(error, UserError) else 500
            self.begin(getattr(error, "status", status), "application/x-ndjson")
        self.wfile.write(json.dumps({"error": line}).encode() + b"\n")

    def begin(self, status: int, kind: str) -> None:
        self.began = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing, because each move of a knob would print a line."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="lesson.explore", description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="DIR", help="a finished run, or any adapter")
    parser.add_argument("--base", **BASE_OPTION)
    parser.add_argument("--quantise", "--quantize", **QUANTISE_OPTION)
    parser.add_argument(
        "--port",
        type=number(int, 0, 65535),
        default=8000,
        metavar="N",
        help="port of 127.0.0.1. 0: any free port (default: %(default)s)",
    )
    add_device_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    refuse_model(args.adapter)
    device = Device.pick(args.device, args.precision)
    tune_process(device)
    with Server(args.port) as server:
        server.explorer = Explorer(args.base, args.adapter, device, args.quantise)
        with suppress(KeyboardInterrupt):  # the usual way to end
            print(f"open http://{ADDRESS}:{server.port} (Ctrl-C ends)", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    run_command(main)
