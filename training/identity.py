"""Identify a run by content: its method and options, and hashes of its base and its book."""

import hashlib
from dataclasses import fields
from pathlib import Path

import numpy as np

from common.errors import UserError
from lora.layer import LoRAConfig
from model.weights import base_hashes
from training.checkpoint import read_checkpoint
from training.options import Options

# Options that may change when a run is resumed: they do not change its result, or they are paths,
# whose contents are compared instead (an initial adapter's are in the checkpoint).
HARMLESS = {"out", "device", "log_every", "checkpoint_every", "gradient_checkpointing", "resume",
            "overwrite", "base", "book", "data", "val_data", "init_adapter"}


def run_identity(options: Options, base: Path, *tokens: np.ndarray) -> dict:
    """Return what makes this run this run: the book by its tokens, since its file may change."""
    book = hashlib.sha256()
    for part in tokens:
        book.update(np.ascontiguousarray(part))
    return {"method": options.method, "options": options.as_json(),
            "base_sha256": base_hashes(base), "book_sha256": book.hexdigest()}


def saved_lora_config(out: Path) -> LoRAConfig:
    """Return the adapter's shape in the run whose checkpoint lies in `out`; of a full fine-tuning,
    which `refuse_another` will refuse, the default.
    """
    options = read_checkpoint(out)["run"]["options"]
    values = {f.name: options[f.name] for f in fields(LoRAConfig) if f.name in options}
    return LoRAConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


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
