"""Identify a run by content: its method and options, and hashes of what it reads."""

import hashlib
from pathlib import Path

import numpy as np

from adapters.files import adapter_path
from common.errors import UserError
from common.files import file_sha256
from model.weights import base_hashes
from training.options import Options

# Options that may change when a run is resumed: they do not affect its result, or they are paths,
# whose contents are compared instead.
MAY_CHANGE_ON_RESUME = {
    "out",
    "device",
    "log_every",
    "checkpoint_every",
    "gradient_checkpointing",
    "resume",
    "overwrite",
    "base",
    "book",
    "data",
    "val_data",
    "init_adapter",
}


def run_identity(options: Options, directory: Path, *tokens: np.ndarray) -> dict:
    """Return what identifies a run: its options, and hashes of base, tokens and initial adapter."""
    book, start = hashlib.sha256(), options.init_adapter
    for part in tokens:
        book.update(np.ascontiguousarray(part))
    return {
        "method": options.method,
        "options": options.as_json(),
        "base_sha256": base_hashes(directory),
        "book_sha256": book.hexdigest(),
        "init_adapter_sha256": file_sha256(adapter_path(start)) if start else None,
    }


def refuse_another(then: dict, now: dict) -> None:
    """Raise UserError, naming what differs, if the run in `--out` is not the one asked for."""
    if then["method"] != now["method"]:
        raise UserError(f"--resume: the run is of `train.py {then['method']}`, not {now['method']}")
    old, new = then["options"], now["options"]
    for name in sorted((old.keys() | new.keys()) - MAY_CHANGE_ON_RESUME):
        if old.get(name) != new.get(name):
            raise UserError(
                f"--resume: --{name.replace('_', '-')} was {old.get(name)!s:.80} and "
                f"is now {new.get(name)!s:.80}; repeat the run's own options"
            )
    contents = {
        "base_sha256": "base",
        "book_sha256": "data" if new["data"] else "book",
        "init_adapter_sha256": "init-adapter",
    }
    for field, option in contents.items():
        if then.get(field) != now[field]:
            raise UserError(f"--resume: --{option}: its content is not what the run began with")
