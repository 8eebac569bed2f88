"""The directory of a run: its files, its lock, and the lines of metrics."""

import errno
import fcntl
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError
from common.files import remove_stale
from data.tokenizer import FILES as TOKENIZER_FILES
from lora.save import WEIGHTS as ADAPTER_WEIGHTS
from storage.card import CARD, is_ours
from storage.runs import RUN
from storage.weights import WEIGHTS as MODEL_WEIGHTS
from training.checkpoint import CHECKPOINT, PREVIOUS

METRICS = "metrics.jsonl"
MODEL_FILES = (
    "adapter_config.json",
    ADAPTER_WEIGHTS,
    "config.json",
    MODEL_WEIGHTS,
    "generation_config.json",
    *TOKENIZER_FILES,
)
# All files that a run writes, except the model card, which the user may have edited. `--overwrite`
# removes these files in this order. run.json is removed first, so that a half-removed run does not
# count as finished. metrics.jsonl is emptied last. If the removal is interrupted before
# metrics.jsonl is emptied, the directory still counts as a run, so it is accepted with
# `--overwrite` or `--resume`.
RUN_FILES = (RUN, CHECKPOINT, PREVIOUS, "loss.png", *MODEL_FILES, METRICS)
RUN_ONLY = {RUN, CHECKPOINT, PREVIOUS, METRICS}  # files with these names come only from runs


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
        remove_stale(out, (*RUN_FILES, CARD))

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

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        for name in RUN_FILES:
            if name != METRICS:
                (self.out / name).unlink(missing_ok=True)
        if is_ours(self.out / CARD):
            (self.out / CARD).unlink()
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
