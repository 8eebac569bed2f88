"""Identify a run by content: its method and options, and hashes of what it reads."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import file_sha256
from lora.files import adapter_path
from storage.weights import base_hashes
from training.options import Options, flag

# Options that do not affect a run's result, or are paths, whose contents are compared instead.
MAY_CHANGE_ON_RESUME = {
    "out",
    "device",
    "log_every",
    "checkpoint_every",
    "gradient_checkpointing",
    "no_cuda_graph",
    "resume",
    "overwrite",
    "base",
    "book",
    "data",
    "val_data",
    "init_adapter",
}


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run this run. `run.json` and the checkpoints hold it."""

    method: str
    options: dict[str, Any]
    base_sha256: dict[str, str]  # of its config and, if there are any, its weights
    book_sha256: str  # of the token ids
    init_adapter_sha256: str | None

    @property
    def base_weights_sha256(self) -> str:
        return self.base_sha256.get("weights", "")


def run_identity(options: Options, directory: Path, *tokens: np.ndarray) -> RunIdentity:
    """Identify a run on the base in `directory` and these token ids."""
    book = hashlib.sha256()
    for part in tokens:
        book.update(np.ascontiguousarray(part))
    init_adapter_sha256 = None
    if options.init_adapter:
        init_adapter_sha256 = file_sha256(adapter_path(options.init_adapter))
    return RunIdentity(
        method=options.method,
        options=options.as_json(),
        base_sha256=base_hashes(directory),
        book_sha256=book.hexdigest(),
        init_adapter_sha256=init_adapter_sha256,
    )


def refuse_another(path: Path, then: dict[str, Any], now: RunIdentity) -> None:
    """Raise UserError, naming what differs, if the run in `--out` is not the one asked for.

    `then` is of the file `path`, which is refused if it holds no identity.
    """
    try:
        differences = _differences(then, now)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume: {path}: damaged, or another version's ({error!r:.80}); start again with "
            "--overwrite"
        ) from error
    if differences:
        raise UserError(f"--resume: {path}: {differences[0]}")


def _differences(then: dict[str, Any], now: RunIdentity) -> list[str]:
    """Say what differs: the method, else options, else the content of what is read."""
    if then["method"] != now.method:
        return [f"the run is of `train.py {then['method']!s:.80}`, not {now.method}"]

    differences = []
    old = then["options"]
    names = (old.keys() | now.options.keys()) - MAY_CHANGE_ON_RESUME
    for name in sorted(names, key=lambda name: (name != "recipe", name)):  # it sets others
        before = old.get(name)
        asked = now.options.get(name)
        if before != asked:
            if name not in old:  # another version had no such option: there is none to repeat
                raise KeyError(name)
            differences.append(
                f"{flag(name)} was {before!s:.80} and is now {asked!s:.80}; "
                "repeat the run's own options"
            )

    text_option = "data" if now.options["data"] else "book"
    contents = {
        "base": (then["base_sha256"], now.base_sha256),
        text_option: (then["book_sha256"], now.book_sha256),
        "init-adapter": (then["init_adapter_sha256"], now.init_adapter_sha256),
    }
    for name, (before, asked) in contents.items():
        if before != asked:
            differences.append(f"--{name}: its content is not what the run began with")
    return differences
