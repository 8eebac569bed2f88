"""Describe in one line what ended a run: memory, the disk, a number that is not finite."""

from common.errors import RunError, UserError, is_out_of_memory
from training.options import Options


def describe_failure(error: BaseException | None, options: Options) -> str | None:
    """Return the line, or None for an error that is a fault of the program or no error.

    A UserError here is of a file that could not be written: no longer the user's mistake.
    """
    if isinstance(error, RunError | UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if is_out_of_memory(error):
        return f"out of memory; {memory_advice(options)}"
    return None


def memory_advice(options: Options) -> str:
    """Name the options that would help."""
    advice = []
    if options.grad_accum < options.batch_size:
        advice.append(f"--grad-accum {min(2 * options.grad_accum, options.batch_size)}")
    if not options.gradient_checkpointing:
        advice.append("--gradient-checkpointing (slower)")
    if options.precision == "fp32":
        advice.append("--precision bf16")
    if options.block_size > 1:
        advice.append(f"--block-size {options.block_size // 2}")
    return "try " + ", ".join(advice or ["a smaller base"])
