"""What ends a run that has begun, in one line: memory, the disk, a number that is none."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from errors import RunError, UserError

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def ending_in_one_line(advice: Callable[[], str], last_checkpoint: Callable[[], str]
                       ) -> Iterator[None]:
    """Turn what a run cannot go on from into a RunError that names the last checkpoint.

    A UserError here is of a file that could not be written; it is no longer the user's mistake.
    """
    try:
        yield
    except (RunError, UserError) as error:
        raise RunError(f"{error}; {last_checkpoint()}") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(f"{where}{error.strerror or error}; {last_checkpoint()}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory; {advice()}; {last_checkpoint()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU's memory or the machine's: torch's CPU allocator has no exception of its own."""
    return (isinstance(error, MemoryError | torch.OutOfMemoryError)
            or (isinstance(error, RuntimeError)
                and any(text in str(error) for text in NO_MEMORY)))


def describe_fault(step: int, what: str, epoch: int, starts: np.ndarray) -> str:
    """One line on a faulty step; `starts`: where in the book its windows begin, in tokens."""
    places = ", ".join(map(str, sorted(starts.tolist())[:16])) + ", ..." * (len(starts) > 16)
    return (f"step {step}: {what} (epoch {epoch + 1}, windows at tokens {places} of the book); "
            "lower --lr or use --precision fp32")


def memory_advice(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> str:
    """The options that would help, and for `--grad-accum` what it would save."""
    knobs = []
    parts = min(args.grad_accum, args.batch_size)
    if parts < args.batch_size:
        saved = _saved_by_halving(model, device)
        knobs.append(f"--grad-accum {min(2 * parts, args.batch_size)} (the same result"
                     + (f", about {saved / 1e6:,.0f} MB less)" if saved else ")"))
    if not getattr(args, "gradient_checkpointing", True):
        knobs.append("--gradient-checkpointing (the same result, slower)")
    if args.precision == "fp32":
        knobs.append("--precision bf16")
    if args.block_size > 1:
        knobs.append(f"--block-size {args.block_size // 2}")
    return "try " + ", ".join(knobs or ["a smaller base"])


def _saved_by_halving(model: torch.nn.Module, device: torch.device) -> float:
    """Half of what the allocator held at its peak beyond weights, gradients and AdamW's moments."""
    if device.type != "cuda":
        return 0.0
    fixed = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
    return max(0.0, torch.cuda.max_memory_allocated(device) - fixed) / 2
