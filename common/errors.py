"""End a command: status 0 done, 1 the run failed, 2 a user's mistake, 130 or 143 a signal."""

import os
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake that the user can fix: one line that says what is wrong and what to do."""


class RunError(Exception):
    """A failure in the run itself, such as a loss that is not finite."""


# torch's CPU allocator and cuBLAS have no exception of their own.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
ADVICE = (
    "a smaller --batch-size, --block-size or --base, --precision bf16 or, in training, "
    "--grad-accum or --gradient-checkpointing"
)


def run_command(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> None:
    """Run `main` and exit with its status; known failures end with one line on stderr.

    `argv` is the command's arguments (default: the command line's).
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a text's characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(argv) or 0
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:  # whoever reads the output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        line = describe_failure(error)
        if line is None:
            raise
        fail(line, 2 if isinstance(error, UserError) else 1)


def describe_failure(error: BaseException | None) -> str | None:
    """Return the line for a known failure; None for a bug in the program, or no error."""
    if isinstance(error, UserError | RunError):
        return str(error)
    if isinstance(error, OSError):  # a full disk, a directory taken away
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    ):
        return f"out of memory; try {ADVICE}"
    return None


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def fail(message: object, status: int) -> None:
    line = " ".join(str(message).splitlines())  # a path can hold a new line
    sys.stderr.write(f"error: {line}\n")  # print's several writes would mix with other ranks'
    sys.exit(status)
