"""What a run leaves in `--out`: who may write there, its checkpoint, its metrics."""

import argparse
import json
import math
import os
from pathlib import Path

import torch

from errors import UserError
from files import atomic_path, read_json

RUN, METRICS, CHECKPOINT = "run.json", "metrics.jsonl", "checkpoint.pt"
# Everything that a run writes; `--overwrite` removes these names and no others.
RUN_FILES = (RUN, METRICS, CHECKPOINT, "loss.png", "adapter_config.json",
             "adapter_model.safetensors", "config.json", "model.safetensors")
RUN_NUMBERS = ("trainable_parameters", "trainable_percent", "base_val_loss", "best_val_loss",
               "best_val_perplexity", "best_val_bits_per_byte", "seconds", "tokens_per_second",
               "peak_memory_mb")
LONGEST_NAME = 4096  # bytes of a path
# Options that may change when a run is resumed, for they do not change its result.
HARMLESS = {"out", "device", "log_every", "checkpoint_every", "resume", "overwrite"}


def check_out(args: argparse.Namespace) -> None:
    """Refuse an output directory in which something would be lost. Raises UserError."""
    # os.path, because Path's own tests raise where a name is too long or may not be looked up
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"--out {args.out}: is a file; name a directory")
    for option in ("base", "init_adapter"):
        refuse_source(args.out, option, getattr(args, option, None))
    held = [name for name in RUN_FILES if os.path.lexists(args.out / name)]
    if args.resume and not {CHECKPOINT, RUN} & set(held):
        raise UserError(f"--resume: {args.out} holds no checkpoint; start without --resume")
    if held and not (args.resume or args.overwrite):
        raise UserError(f"--out {args.out}: holds a run ({held[0]}); --resume goes on with it, "
                        "--overwrite replaces it, or name another")


def refuse_source(out: Path, option: str, source: str | Path | None) -> None:
    """Raises UserError if the run would overwrite the directory that it starts from."""
    if source and os.path.isdir(source) and os.path.realpath(out) == os.path.realpath(source):
        raise UserError(f"--out {out}: is what --{option.replace('_', '-')} reads; name another")


def start_afresh(out: Path, base: Path) -> None:
    """An empty run directory, old results removed. Raises UserError if it cannot be written."""
    refuse_source(out, "base", base)  # known by its directory only now, if it was named otherwise
    with atomic_path(out / METRICS):
        pass
    for name in RUN_FILES:
        if name != METRICS:
            (out / name).unlink(missing_ok=True)


def append_metrics(out: Path, metrics: dict) -> int:
    """Add a line to `metrics.jsonl`; return the file's length in bytes.

    JSON knows no infinity: the gradient norm of an fp16 step that overflowed is null.
    """
    metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with open(out / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
        return file.tell()


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]


def read_run(directory: Path) -> dict:
    """A finished run's `run.json`. Raises UserError when it is missing or of another make."""
    path = directory / RUN
    run = read_json(path)
    base, numbers = run.get("base"), [run.get(name) for name in RUN_NUMBERS]
    if (run.get("method") not in ("lora", "full") or not isinstance(run.get("options"), dict)
            or not isinstance(base, str) or not base.isprintable() or len(base) > LONGEST_NAME
            or not all(isinstance(x, int | float) and 1e-15 < x < 1e15 for x in numbers)):
        raise UserError(f"{path}: is not what train.py leaves at the end of a run")
    return run


def options(args: argparse.Namespace) -> dict:
    """Every option's value, as JSON holds it."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name != "method"}


def write_checkpoint(args: argparse.Namespace, book_hash: str, state: dict) -> None:
    """Save `state` with what identifies the run: its options and its book's hash."""
    state = state | {"options": options(args), "book": book_hash}
    with atomic_path(args.out / CHECKPOINT) as temporary:
        torch.save(state, temporary)


def read_checkpoint(args: argparse.Namespace, book_hash: str) -> dict:
    """The state that `write_checkpoint` saved. Raises UserError if it is another run's."""
    path = args.out / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        then, book = state["options"], state["book"]
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise UserError(f"{path}: not a checkpoint ({type(error).__name__})") from error
    now = options(args)
    for name in sorted(then.keys() - HARMLESS):
        if now.get(name) != then[name]:
            raise UserError(f"--resume: --{name.replace('_', '-')} was {then[name]} and is now "
                            f"{now.get(name)}; repeat the run's own options")
    if book != book_hash:
        raise UserError(f"--resume: {args.book} has changed since the run began")
    return state


def cut_metrics(out: Path, length: int) -> None:
    """Drop the lines of steps after the checkpoint: they are run again."""
    with open(out / METRICS, "rb+") as file:
        file.truncate(length)
