"""End a command with an exit status and, after a failure, with one line on stderr.

The status is 0 for success, 1 for a failed run, 2 for a user's mistake, and 128 + n for signal n.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from common.signals import replace_default_handlers


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: the mistake and the remedy."""


class RunError(Exception):
    """A failure in the run itself, such as a full disk."""


class LossNotFinite(RunError):
    """A loss that is infinite or not a number."""


@contextmanager
def as_failure(kind: type[Exception] = UserError) -> Iterator[None]:
    """Turn a library's ValueError or OSError into an exception of class `kind`, which ends a
    command with one line."""
    try:
        yield
    except ValueError as error:
        raise kind(str(error)) from error
    except OSError as error:
        raise kind(_with_file(error)) from error


# torch's CPU allocator and cuBLAS raise a plain RuntimeError with one of these texts.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
ADVICE = (
    "a smaller --batch-size, --block-size or --base, --precision bf16 or, in training, "
    "--grad-accum or --gradient-checkpointing"
)

# An OSError with one of these numbers is the user's mistake: no permission, or too long a name.
USERS_MISTAKE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
# An OSError with one of these numbers means that the machine failed. An uncaught OSError with
# another number is a bug.
FULL_OR_BROKEN = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}


def run_command(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run `main` and exit with its status. Known failures end with one line on stderr."""
    replace_default_handlers()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # for a terminal that is not UTF-8
    try:
        status = main(argv) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader of the output has ended, as in `| head`
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        fail("the program that reads the output has ended", 1)
    except Exception as error:
        line = describe_failure(error)
        if line is None:
            raise
        fail(line, 2 if _is_mistake(error) else 1)
    sys.exit(status)


def _is_mistake(error: Exception) -> bool:
    return isinstance(error, UserError) or (
        isinstance(error, OSError) and error.errno in USERS_MISTAKE
    )


def describe_failure(error: BaseException | None) -> str | None:
    """Return the line for a known failure. Return None for a bug, or if `error` is None."""
    if isinstance(error, UserError | RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno in USERS_MISTAKE | FULL_OR_BROKEN:
        return _with_file(error)
    no_memory = isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        return f"out of memory; try {ADVICE}"
    return None


def _with_file(error: OSError) -> str:
    """Return the operating system's message for the error. If the error names a file, put the
    file's name first."""
    if not error.filename:
        return str(error.strerror or error)
    return f"{error.filename}: {error.strerror}"


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def fail(message: object, status: int) -> NoReturn:
    line = " ".join(str(message).splitlines())  # a path can contain a new line
    sys.stderr.write(f"error: {line}\n")  # one write, because other processes print too
    sys.exit(status)
