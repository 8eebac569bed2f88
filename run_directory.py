"""What a run leaves in `--out`: who may write there, its checkpoint, its metrics."""

import argparse
import json
from pathlib import Path

import torch

from data.tokens import file_sha256
from errors import UserError
from files import atomic_path

RUN, METRICS, CHECKPOINT = "run.json", "metrics.jsonl", "checkpoint.pt"
# Everything that a run writes; `--overwrite` removes these names and no others.
RUN_FILES = (RUN, METRICS, CHECKPOINT, "loss.png", "adapter_config.json",
             "adapter_model.safetensors", "config.json", "model.safetensors")
# Options that may change when a run is resumed, for they do not change its result.
HARMLESS = {"out", "device", "log_every", "checkpoint_every", "resume", "overwrite"}


def check_out(args: argparse.Namespace) -> None:
    """Refuse an output directory in which something would be lost. Raises UserError."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; name a directory")
    for option in ("base", "init_adapter"):
        source = getattr(args, option, None)
        if source and Path(source).is_dir() and args.out.resolve() == Path(source).resolve():
            raise UserError(f"--out {args.out}: is what --{option.replace('_', '-')} reads; "
                            "name another")
    held = [name for name in RUN_FILES if (args.out / name).exists()]
    if args.resume and not {CHECKPOINT, RUN} & set(held):
        raise UserError(f"--resume: {args.out} holds no checkpoint; start without --resume")
    if held and not (args.resume or args.overwrite):
        raise UserError(f"--out {args.out}: holds a run ({held[0]}); --resume goes on with it, "
                        "--overwrite replaces it, or name another")


def start_afresh(out: Path) -> None:
    """An empty run directory, old results removed. Raises UserError if it cannot be written."""
    with atomic_path(out / METRICS):
        pass
    for name in RUN_FILES:
        if name != METRICS:
            (out / name).unlink(missing_ok=True)


def append_metrics(out: Path, metrics: dict) -> int:
    """Add a line to `metrics.jsonl`; return the file's length in bytes."""
    with open(out / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
        return file.tell()


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]


def options(args: argparse.Namespace) -> dict:
    """Every option's value, as JSON holds it."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name != "method"}


def write_checkpoint(args: argparse.Namespace, state: dict) -> None:
    """Save `state` with what identifies the run: its options and its book's hash."""
    state = state | {"options": options(args), "book": file_sha256(args.book)}
    with atomic_path(args.out / CHECKPOINT) as temporary:
        torch.save(state, temporary)


def read_checkpoint(args: argparse.Namespace) -> dict:
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
    if book != file_sha256(args.book):
        raise UserError(f"--resume: {args.book} has changed since the run began")
    return state


def cut_metrics(out: Path, length: int) -> None:
    """Drop the lines of steps after the checkpoint: they are run again."""
    with open(out / METRICS, "rb+") as file:
        file.truncate(length)
