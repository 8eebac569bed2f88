"""What a run leaves in `--out`: who may write there, its metrics, its report."""

import argparse
import errno
import fcntl
import json
import math
import os
import shutil
import stat
import sys
from pathlib import Path

from errors import RunError, UserError
from files import read_json, remove_stale

RUN, METRICS = "run.json", "metrics.jsonl"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
# Everything that a run writes; `--overwrite` removes these names and no others. In this order: at
# any moment of it, what is left is an old run that can be gone on with, or none.
RUN_FILES = (RUN, CHECKPOINT, PREVIOUS, "loss.png", "adapter_config.json",
             "adapter_model.safetensors", "config.json", "model.safetensors", METRICS)
RUN_NUMBERS = ("trainable_parameters", "trainable_percent", "base_val_loss", "best_val_loss",
               "best_val_perplexity", "best_val_bits_per_byte", "seconds", "tokens_per_second",
               "peak_memory_mb")
LONGEST_NAME = 4096  # bytes of a path
# Options that may change when a run is resumed, for they do not change its result.
HARMLESS = {"out", "device", "log_every", "checkpoint_every", "gradient_checkpointing", "resume",
            "overwrite"}


def check_out(args: argparse.Namespace) -> None:
    """Refuse an output directory in which something would be lost. Raises UserError."""
    # os.path, because Path's own tests raise where a name is too long or may not be looked up
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"--out {args.out}: is a file; name a directory")
    for option in ("base", "init_adapter"):
        refuse_source(args.out, option, getattr(args, option, None))
    present = [name for name in RUN_FILES if os.path.lexists(args.out / name)]
    if args.resume and not {RUN, CHECKPOINT, PREVIOUS, METRICS} & set(present):
        raise UserError(f"--resume: {args.out} holds no checkpoint; start without --resume")
    held = [name for name in present if name != METRICS or os.lstat(args.out / name).st_size]
    if held and not (args.resume or args.overwrite):
        raise UserError(f"--out {args.out}: holds a run ({held[0]}); --resume goes on with it, "
                        "--overwrite replaces it, or name another")


def refuse_source(out: Path, option: str, source: str | Path | None) -> None:
    """Raises UserError if the run would overwrite the directory that it starts from."""
    if source and os.path.isdir(source) and os.path.realpath(out) == os.path.realpath(source):
        raise UserError(f"--out {out}: is what --{option.replace('_', '-')} reads; name another")


def check_space(out: Path, needed: int) -> None:
    """Raises UserError unless `needed` bytes fit, those that the files of a run there give back."""
    place = next(p for p in (out, *out.absolute().parents) if os.path.isdir(p))
    given_back = sum(os.path.getsize(out / name) for name in RUN_FILES
                     if os.path.isfile(out / name))
    free = shutil.disk_usage(place).free + given_back
    if free < needed:
        raise UserError(f"--out {out}: the run needs {needed / 1e6:,.1f} MB there and "
                        f"{free / 1e6:,.1f} MB are free; make space or name another place")


class RunDirectory:
    """`--out`, locked for this process: metrics.jsonl stays open and carries the lock.

    The system drops the lock when the process ends, however it ends. No symbolic link in the
    directory is followed: this file is opened without, all others are replaced by renaming.
    Raises UserError when the directory cannot be written or another run has it.
    """

    def __init__(self, out: Path):
        self.out, self.metrics = out, out / METRICS
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.metrics, flags, 0o666)
        except OSError as error:
            reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise UserError(f"{self.metrics}: cannot be written ({reason})") from error
        if not stat.S_ISREG(os.fstat(self.file).st_mode):
            raise UserError(f"{self.metrics}: is not a file; remove it")
        self.lock()
        remove_stale(out, RUN_FILES)

    def lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.file)
            raise UserError(f"--out {self.out}: another run is at work there; wait for its end, "
                            "or name another") from error
        except OSError as error:  # some network file systems know no locks
            print(f"warning: {self.metrics}: cannot be locked ({error.strerror}); start no other "
                  "run there", file=sys.stderr)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *error) -> None:
        os.close(self.file)

    def clear(self) -> None:
        """Remove an earlier run. Raises UserError if that is not allowed."""
        for name in RUN_FILES:
            if name != METRICS:
                try:
                    (self.out / name).unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(f"{self.out / name}: cannot be removed "
                                    f"({error.strerror})") from error
        os.ftruncate(self.file, 0)

    def check(self) -> None:
        """Raises RunError when the directory is no longer the one that the run began in."""
        try:
            same = os.path.samestat(os.fstat(self.file), os.lstat(self.metrics))
        except OSError:
            same = False
        if not same:
            raise RunError(f"{self.metrics}: has vanished or was replaced while the run was "
                           "writing it")

    def append(self, metrics: dict) -> int:
        """Add a line to `metrics.jsonl`; return the file's length in bytes.

        JSON knows no infinity: the gradient norm of an fp16 step that overflowed is null.
        """
        self.check()
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = (json.dumps(finite) + "\n").encode()
        try:
            while line:
                line = line[os.write(self.file, line):]
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written ({error.strerror})") from error
        return os.fstat(self.file).st_size

    def sync(self) -> None:
        """Bring the metrics to the disk, before a checkpoint that counts on them."""
        self.check()
        os.fsync(self.file)

    def cut(self, length: int) -> bool:
        """Drop the lines of steps after the checkpoint: they are run again.

        False when there are fewer than the checkpoint counts on; then a torn last line goes.
        """
        size = os.fstat(self.file).st_size
        if size >= length:
            os.ftruncate(self.file, length)
            return True
        os.ftruncate(self.file, self.metrics.read_bytes().rfind(b"\n") + 1)
        return False


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
    return {name: str(value) if isinstance(value, Path)
            else list(value) if isinstance(value, tuple) else value
            for name, value in vars(args).items() if name != "method"}
