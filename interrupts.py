"""How SIGINT and SIGTERM end a command that has nothing to save: with one line, 130 or 143.

A command that imports this before torch, whose import takes seconds, shows no traceback there.
"""

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

unfinished: set[Path] = set()  # folders of files that are being written (`files.atomic_path`)


def end_in_one_line() -> None:
    """From here on, a signal ends the process at once."""
    on_signals(end_at_once)


def on_signals(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def end_at_once(number: int, frame) -> None:
    """No exception, which an import or a destructor may swallow or print as a traceback."""
    for folder in list(unfinished):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(Exception):
        sys.stdout.flush()
    say("error: interrupted")
    os._exit(128 + number)


def say(line: str) -> None:
    """To stderr past Python's buffers, in which a handler may have interrupted a write."""
    os.write(2, f"{line}\n".encode())
