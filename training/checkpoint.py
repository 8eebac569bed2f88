"""checkpoint.pt and the one before it: written whole, verified before they are believed."""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from files import atomic_path
from training.directory import CHECKPOINT, PREVIOUS
from untrusted import read_torch


def write_checkpoint(out: Path, state: dict) -> None:
    """Save `state` as the newest checkpoint; the newest until now becomes the previous one.

    At every instant one of the two is whole. `state` holds tensors, numbers, strings, lists,
    tuples and dicts; the sha256 of its content goes into the file with it.
    """
    with (atomic_path(out / CHECKPOINT, backup=out / PREVIOUS) as temporary,
          open(temporary, "wb") as file):
        torch.save(state | {"sha256": content_sha256(state)}, file)


def has_checkpoint(out: Path) -> bool:
    return any(os.path.lexists(out / name) for name in (CHECKPOINT, PREVIOUS))


def read_checkpoint(out: Path) -> tuple[dict, Path]:
    """The newest whole state and its file, with a warning if a newer one is damaged.

    Raises UserError if no file is whole.
    """
    damaged = []
    for path in (out / CHECKPOINT, out / PREVIOUS):
        if not os.path.lexists(path):
            continue
        state, problem = _read(path)
        if problem:
            damaged.append(f"{path}: damaged ({problem})")
            continue
        if damaged:
            print(f"warning: {damaged[0]}; going on from {path}", file=sys.stderr)
        return state, path
    raise UserError(f"{'; '.join(damaged)}; start again with --overwrite" if damaged else
                    f"--resume: {out} holds no checkpoint; start without --resume")


def settle(out: Path, path: Path) -> None:
    """Make the file that a run goes on from its newest checkpoint, in place of a damaged one."""
    if path.name == PREVIOUS:
        os.replace(path, out / CHECKPOINT)


def _read(path: Path) -> tuple[dict, str | None]:
    """A checkpoint's state, and what is wrong with the file if anything is."""
    try:
        open(path, "rb").close()
        state = read_torch(path)
        told = state.pop("sha256")
    except OSError as error:  # says nothing of the file's content
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UserError as error:
        return {}, str(error).removeprefix(f"{path}: ")
    except (AttributeError, KeyError, TypeError):
        return {}, "not a checkpoint"
    if told != content_sha256(state):
        return {}, "its sha256 is not that of its content"
    return state, None


def content_sha256(value: object) -> str:
    """Of what a state says, however a file spells it: types, shapes, keys in order, every bit."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes | np.ndarray]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, dict | list | tuple):
        yield f"{type(value).__name__}{len(value)}".encode()
        for item in value.items() if isinstance(value, dict) else value:
            yield from _parts(item)
    else:
        yield f"{type(value).__name__}{value!r}".encode()
