"""End a command on SIGINT, SIGTERM or SIGHUP, with one line and exit status 130, 143 or 129."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | signal.Handlers

unfinished: set[Path] = set()  # temporary files and directories that are being written

# Under `nohup`, keep ignoring SIGHUP, so that the run outlives the terminal.
HANDLED = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    HANDLED.append(signal.SIGHUP)

# Which of stdout and stderr are terminals when the command starts, while no terminal is closed yet
TERMINALS = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def replace_default_handlers() -> None:
    """Let SIGTERM and SIGHUP print one line and exit, unless another handler is set.

    By default, both signals kill the process, which leaves unfinished files behind. SIGINT needs no
    handler, because SIGINT raises KeyboardInterrupt.
    """
    for number in HANDLED:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end_at_once)


def on_signals(handler: Handler) -> None:
    """Handle SIGINT, SIGTERM and SIGHUP with `handler`."""
    for number in HANDLED:
        signal.signal(number, handler)


def leave_closed_terminals() -> None:
    """Discard further output to a closed terminal, because writing there raises OSError."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in TERMINALS:
        if not os.isatty(descriptor):
            os.dup2(nowhere, descriptor)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Exit at once, and raise no exception, because an import or a destructor could swallow or
    print it."""
    for path in list(unfinished):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with suppress(Exception):
        sys.stdout.flush()
    say("error: interrupted")
    os._exit(128 + number)


def say(line: str) -> None:
    """Write to stderr without Python's buffers: a signal may have interrupted a buffered write."""
    with suppress(OSError):  # in `train.py 2>&1 | tee log`, Ctrl-C also ends `tee`
        os.write(2, f"{line}\n".encode())
