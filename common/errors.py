"""End a command: status 0 done, 1 the run itself failed, 2 a user's mistake, 130 interrupted."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


class RunError(Exception):
    """A failure in the run itself, such as a loss that is not finite."""


# torch's CPU allocator and cuBLAS have no exception of their own.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its status; known failures end with one line on stderr."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know every character of a text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        fail(error, 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RunError, OSError) as error:  # OSError: a full disk, a directory taken away
        fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("out of memory; try a smaller base, batch or block, or --precision bf16", 1)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether the GPU or the machine has run out of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY))


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def fail(message: object, status: int) -> None:
    line = " ".join(str(message).splitlines())  # a path can hold a new line
    sys.stderr.write(f"error: {line}\n")  # print's several writes would mix with other ranks'
    sys.exit(status)
