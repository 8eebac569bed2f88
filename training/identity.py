"""Which run a directory holds: its options, its base and its book, compared before it goes on."""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from data.tokens import file_sha256
from errors import UserError
from lora.config import LoRAConfig
from model.checkpoint import has_weights, weights_path
from training.directory import HARMLESS, options, read_run


def run_identity(args: argparse.Namespace, base: Path, *tokens: np.ndarray) -> dict:
    """What makes this run this run: method, options, and hashes of the base and of the book.

    The book's is over its tokens: over what is trained on, though the file may change meanwhile.
    """
    book = hashlib.sha256()
    for part in tokens:
        book.update(np.ascontiguousarray(part))
    files = [base / "config.json", *([weights_path(base)] if has_weights(base) else [])]
    return {"method": args.method, "options": options(args), "book": book.hexdigest(),
            "base": {path.name: file_sha256(path) for path in files}}


def refuse_another(then: object, now: dict) -> None:
    """Raises UserError that names what differs between a run and the one to go on with it."""
    if not (isinstance(then, dict) and then.keys() == now.keys()
            and all(isinstance(then[key], type(now[key])) for key in now)):
        raise UserError("--resume: the checkpoint does not say which run it is of; it is of "
                        "another version, or no checkpoint of train.py")
    refuse_other_options(then["method"], then["options"], now["method"], now["options"])
    if then["book"] != now["book"]:
        raise UserError(f"--resume: {now['options']['book']} has changed since the run began")
    for name in sorted(then["base"].keys() | now["base"].keys()):
        if then["base"].get(name) != now["base"].get(name):
            raise UserError(f"--resume: --base {now['options']['base']}: its {name} has changed "
                            "since the run began")


def refuse_other_options(method_then: str, then: dict, method_now: str, now: dict) -> None:
    if method_then != method_now:
        raise UserError(f"--resume: the run is of `train.py {method_then}`, not {method_now}")
    for name in sorted((then.keys() | now.keys()) - HARMLESS):
        if str(now.get(name)) != str(then.get(name)):
            raise UserError(f"--resume: --{name.replace('_', '-')} was {then.get(name)!s:.80} "
                            f"and is now {now.get(name)!s:.80}; repeat the run's own options")


def check_finished(args: argparse.Namespace) -> None:
    """Raises UserError if the finished run in `--out` is not the one that these options ask for.

    What `auto` and `--init-adapter` stand for is known only when they are read: not compared.
    """
    run, now = read_run(args.out), options(args)
    unknown = set(LoRAConfig.__dataclass_fields__) if now.get("init_adapter") else set()
    unknown |= {name for name in ("base", "precision") if now[name] == "auto"}
    then = {name: value for name, value in run["options"].items() if name not in unknown}
    now = {name: value for name, value in now.items() if name not in unknown}
    refuse_other_options(run["method"], then, args.method, now)
