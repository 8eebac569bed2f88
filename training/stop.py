"""Stop a run after SIGINT, SIGTERM or SIGHUP, once the step is done and saved."""

import signal
import sys
from types import FrameType
from typing import NoReturn

from common.processes import Processes
from common.signals import end_at_once, leave_closed_terminals, on_signals, say


class Stop:
    """The signal that asks a run to stop. `number` is 0 until a signal arrives."""

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self.number = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """At the first signal, remember it. At a second signal, end the process at once.

        Ignore a repeated SIGTERM, because `timeout` and `make` both forward it. Ignore a repeated
        SIGHUP, because a closed terminal and the shell both send it.
        """
        leave_closed_terminals()  # SIGHUP means that a terminal was closed
        repeated = number == self.number
        if repeated and number != signal.SIGINT:
            return
        if self.number:
            end_at_once(number, frame)
        self.number = number
        if self.is_main:
            say("stopping once the step is done and saved; Ctrl-C stops at once")

    def end(self, number: int, message: str, processes: Processes) -> NoReturn:
        """End the process with the exit status of the signal. The caller saves the run first."""
        # Another signal during Python's exit would change the exit status.
        on_signals(signal.SIG_IGN)
        if self.is_main:
            print(f"{message}; the same command with --resume continues", file=sys.stderr)
        processes.barrier()  # when a process ends, torchrun kills the others
        sys.exit(128 + number)
