"""Start a command: do what must come before torch, whose import takes a second or more."""

import gc
from collections.abc import Callable, Sequence

from common.errors import failures_in_one_line
from common.signals import install_exit_handlers


def before_torch(
    parse: Callable[[str | None, Sequence[str] | None], object], description: str | None
) -> None:
    """Handle signals, and end here for `--help` or a mistake on the command line.

    `parse` reads the command line, without torch; `main` calls it again for the options.
    """
    install_exit_handlers()
    with failures_in_one_line():
        parse(description, None)
    gc.disable()  # imports leave no garbage to look for; `run_command` enables it
