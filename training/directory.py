"""The directory of a run, `--out`: its files, its lock, and what it may contain before the run."""

import errno
import fcntl
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError
from common.files import remove_stale
from data.tokenizer import FILES as TOKENIZER_FILES
from lora.save import WEIGHTS as ADAPTER_WEIGHTS
from storage.runs import RUN, read_run
from storage.weights import WEIGHTS as MODEL_WEIGHTS
from training.checkpoint import CHECKPOINT, PREVIOUS
from training.identity import refuse_another_run
from training.options import Options
from training.plan import Plan

METRICS = "metrics.jsonl"
MODEL_FILES = (
    "adapter_config.json",
    ADAPTER_WEIGHTS,
    "config.json",
    MODEL_WEIGHTS,
    "generation_config.json",
    *TOKENIZER_FILES,
)
# All files that a run writes. `--overwrite` removes these files in this order. run.json is removed
# first, so that a half-removed run does not count as finished. metrics.jsonl is emptied last. If
# the removal is interrupted before that, the directory still counts as a run, so it
# is accepted with `--overwrite` or `--resume`.
RUN_FILES = (RUN, CHECKPOINT, PREVIOUS, "loss.png", *MODEL_FILES, METRICS)
RUN_ONLY = {RUN, CHECKPOINT, PREVIOUS, METRICS}  # files with these names come only from runs


def is_finished(plan: Plan) -> bool:
    """Return, in every process, whether --resume finds this run finished in `--out`.

    Raises UserError for an `--out` that the run must not write to.
    """
    finished = plan.processes.from_main(plan.processes.is_main and check_out(plan))
    if finished:
        print(f"{plan.options.out}: this run is finished; nothing to resume")
    return finished


def check_out(plan: Plan) -> bool:
    """Return whether --resume finds this run finished. Raises UserError if `--out` contains another
    run, an input of this run, or other files with the names that a run writes. But with --resume,
    `Saver.restore` refuses another unfinished run.
    """
    options = plan.options
    refuse_used(options)
    refuse_inputs(options, plan.base_directory)
    if not options.resume or not (options.out / RUN).exists():
        return False
    refuse_another_run(options.out / RUN, read_run(options.out), plan.identity)
    return True


def refuse_used(options: Options) -> None:
    """Raise UserError if `--out` contains a run, unless --resume or --overwrite is given.

    Also refuse a path to a file, and a directory that contains a model but no run. With --resume,
    also refuse a directory without a run, and a best model without the checkpoint that identifies
    its run.
    """
    out = options.out
    if os.path.exists(out) and not os.path.isdir(out):  # Path.exists raises if a name is too long
        raise UserError(f"--out {out}: is a file; name a directory")
    try:
        str(out).encode()
    except UnicodeEncodeError as error:  # safetensors cannot open such a path
        raise UserError(f"--out {out}: is not UTF-8; name another directory") from error

    present = [name for name in RUN_FILES if os.path.lexists(out / name)]
    if present and RUN_ONLY.isdisjoint(present):
        raise UserError(f"--out {out}: contains {present[0]}, but no run; name another directory")
    if options.resume and not present:
        raise UserError(f"--resume: {out} contains no checkpoint; start without --resume")
    best = [name for name in (ADAPTER_WEIGHTS, MODEL_WEIGHTS) if name in present]
    if options.resume and best and {RUN, CHECKPOINT, PREVIOUS}.isdisjoint(present):
        raise UserError(
            f"--resume: {out} contains {best[0]} and no checkpoint; --overwrite replaces the model"
        )
    only_began = present == [METRICS] and not os.lstat(out / METRICS).st_size
    if present and not (only_began or options.resume or options.overwrite):
        raise UserError(
            f"--out {out}: contains a run ({present[0]}); --resume continues it, "
            "--overwrite replaces it, or name another directory"
        )


def refuse_inputs(options: Options, base_directory: Path) -> None:
    """Raise UserError if the run would overwrite one of its inputs, even through a link."""
    out = options.out
    written = {}
    for name in RUN_FILES:
        if os.path.exists(out / name):
            written[_inode(out / name)] = name

    for flag, path in _inputs(options, base_directory):
        if path.is_dir() and os.path.isdir(out) and os.path.samefile(path, out):
            raise UserError(f"--out {out}: is an input of {flag}; name another directory")
        files = path.iterdir() if path.is_dir() else [path]
        for file in files:
            if file.exists() and _inode(file) in written:
                raise UserError(
                    f"--out {out}: {written[_inode(file)]} is an input of {flag} ({file}); "
                    "name another directory"
                )


def _inputs(options: Options, base_directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield pairs: the option that names an input of the run, and the path of this input."""
    yield "--base", base_directory
    for book in options.book:
        yield "--book", book
    if options.data:
        yield "--data", options.data
    if options.val_data:
        yield "--val-data", options.val_data
    if options.init_adapter:
        yield "--init-adapter", options.init_adapter


def _inode(path: Path) -> tuple[int, int]:
    """Return a key that is equal for all paths to a file, even through links or bind mounts."""
    status = path.stat()
    return status.st_dev, status.st_ino


class RunDirectory:
    """Lock `--out` for this process. The lock is on metrics.jsonl, which stays open.

    The operating system releases the lock when the process ends, even after a crash. A run never
    writes through a symbolic link: metrics.jsonl is opened with O_NOFOLLOW, and all other files are
    replaced by renaming. Raises UserError if the directory cannot be written or another run has the
    lock.
    """

    def __init__(self, out: Path):
        self.out = out
        self.metrics = out / METRICS
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.metrics, flags, 0o666)
        except OSError as error:
            reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise UserError(f"{self.metrics}: cannot be written ({reason})") from error
        self._lock()
        remove_stale(out, RUN_FILES)

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.file)
            raise UserError(
                f"--out {self.out}: another run is using it; wait until it ends, or "
                "name another directory"
            ) from error
        except OSError:
            message = f"warning: {self.metrics}: cannot be locked; start no other run in --out"
            print(message, file=sys.stderr)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.file)

    def clear(self, options: Options) -> None:
        """Remove the files of an earlier run. Raises UserError as `refuse_used` does, because
        another run may have begun and ended since `is_finished`.
        """
        refuse_used(options)
        for name in RUN_FILES:
            if name != METRICS:
                (self.out / name).unlink(missing_ok=True)
        os.ftruncate(self.file, 0)

    def append(self, metrics: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`. Numbers that overflowed in fp16 become null."""
        finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        line = (json.dumps(finite) + "\n").encode()
        try:
            while line:  # a full disk may take only part of a line
                line = line[os.write(self.file, line) :]
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written ({error.strerror})") from error

    def sync(self) -> int:
        """Flush the metrics to the disk. Return the length of the file in bytes, for `cut`."""
        os.fsync(self.file)
        return os.fstat(self.file).st_size

    def cut(self, length: int) -> None:
        """Truncate the metrics to `length`, because the steps after the checkpoint run again."""
        if os.fstat(self.file).st_size > length:
            os.ftruncate(self.file, length)
