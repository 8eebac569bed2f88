"""Identify a run by content: its method and options, and hashes of its base and its book."""

import hashlib
from pathlib import Path

import numpy as np

from common.errors import UserError
from model.weights import base_hashes
from training.options import Options

# Options that may change when a run is resumed: they do not change its result, or they are paths,
# whose contents are compared instead (an initial adapter's A and B are in the checkpoint).
HARMLESS = {"out", "device", "log_every", "checkpoint_every", "gradient_checkpointing", "resume",
            "overwrite", "base", "book", "data", "val_data", "init_adapter"}


def run_identity(options: Options, base: Path, *tokens: np.ndarray) -> dict:
    """Return what makes this run this run: the book by its tokens, since its file may change."""
    book = hashlib.sha256()
    for part in tokens:
        book.update(np.ascontiguousarray(part))
    return {"method": options.method, "options": options.as_json(),
            "base_sha256": base_hashes(base), "book_sha256": book.hexdigest()}


def refuse_another(then: dict, now: dict) -> None:
    """Raise UserError that names what differs between a run in `--out` and the one asked for."""
    if then["method"] != now["method"]:
        raise UserError(f"--resume: the run is of `train.py {then['method']}`, not {now['method']}")
    old, new = then["options"], now["options"]
    for name in sorted((old.keys() | new.keys()) - HARMLESS):
        if old.get(name) != new.get(name):
            raise UserError(f"--resume: --{name.replace('_', '-')} was {old.get(name)!s:.80} and "
                            f"is now {new.get(name)!s:.80}; repeat the run's own options")
    if then["book_sha256"] != now["book_sha256"]:
        source = f"data {new['data']}" if new["data"] else f"book {' '.join(new['book'])}"
        raise UserError(f"--resume: --{source}: its text changed since the run began")
    before, after = then["base_sha256"], now["base_sha256"]
    for part in sorted(before.keys() | after.keys()):
        if before.get(part) != after.get(part):
            raise UserError(f"--resume: --base {new['base']}: its {part} changed since the run "
                            "began")
