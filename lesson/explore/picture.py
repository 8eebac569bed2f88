"""Draw a run's page for docs/explore.md: `python -m lesson.explore.picture runs/lora`."""

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path

from common.cli import BASE_OPTION, Parser
from common.device import Device, tune_process
from common.errors import run_command
from common.files import atomic_path
from lesson.explore.__main__ import ADDRESS, Server
from lesson.explore.browser import Browser
from lesson.explore.explorer import Explorer

OUT = Path("docs/figures/explore.png")
SIZE = (1200, 1250)
MARKED = """
    const gain = (span) => span.token.gain ?? 0;
    const most = [...document.querySelectorAll("#tokens span")].reduce(
      (one, other) => (gain(other) > gain(one) ? other : one));
    most.id = "most";
"""


def draw(browser: Browser, address: str, path: Path) -> None:
    """Open the page, and save a picture with the mouse on the token with the largest gain."""
    browser.prefer("light")
    browser.resize(*SIZE)
    browser.open(address)
    browser.wait("document.getElementById('write-status').textContent.startsWith('Both')")
    browser.wait("document.querySelector('#tokens .gain') !== null")
    browser.run(MARKED)
    browser.point("#most")
    browser.screenshot(path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = Device.pick()
    tune_process(device)
    with Server(0) as server:
        server.explorer = Explorer(args.base, args.adapter, device)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Browser() as browser, atomic_path(args.out) as temporary:
            draw(browser, f"http://{ADDRESS}:{server.port}", temporary)
        server.shutdown()
    print(f"drawn in {args.out}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="lesson.explore.picture", description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="DIR")
    parser.add_argument("--base", **BASE_OPTION)
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FILE", help="default: %(default)s"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
