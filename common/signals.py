"""End a command on SIGINT or SIGTERM, with one line and exit status 130 or 143.

A command imports this before torch, which takes seconds, so that a signal shows no traceback.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | signal.Handlers

if sys.platform == "win32":  # no fcntl, no fsync of a directory
    sys.stderr.write("error: Windows is supported under WSL only; start this command there\n")
    sys.exit(2)

for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, _name) is None:  # closed by the caller, as with `>&-`
        setattr(sys, _name, open(os.devnull, _mode))  # noqa: SIM115

unfinished: set[Path] = set()  # temporary files that are being written (`files.atomic_path`)


def install_exit_handlers() -> None:
    """On SIGINT or SIGTERM, print one line and exit."""
    on_signals(end_at_once)


def on_signals(handler: Handler) -> None:
    """Handle SIGINT and SIGTERM with `handler`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Exit without an exception, which an import or a destructor could swallow or print."""
    for path in list(unfinished):
        path.unlink(missing_ok=True)
    with suppress(Exception):
        sys.stdout.flush()
    say("error: interrupted")
    os._exit(128 + number)


def say(line: str) -> None:
    """Write to stderr past Python's buffers: the signal may have interrupted a buffered write."""
    os.write(2, f"{line}\n".encode())
