"""Guard `--out`: check that nothing is lost there, lock it, and write metrics.jsonl."""

import errno
import fcntl
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from common.errors import RunError, UserError
from common.files import brief, is_utf8, remove_stale
from model.tokenizer_files import FILES as TOKENIZER_FILES
from training.checkpoint import CHECKPOINT, PREVIOUS
from training.options import Options

RUN, METRICS = "run.json", "metrics.jsonl"
OLD_CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # of versions before safetensors
# Everything that a run writes; `--overwrite` removes these names and no others. With this order,
# what is left at any moment is an old run that can be resumed, or none.
RUN_FILES = (
    RUN,
    CHECKPOINT,
    PREVIOUS,
    *OLD_CHECKPOINTS,
    "loss.png",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
    *TOKENIZER_FILES,
    METRICS,
)


def refuse_used_directory(options: Options) -> None:
    """Raise UserError for an output directory in which something would be lost."""
    out = options.out
    if not is_utf8(str(out)):
        raise UserError(f"--out {brief(str(out))}: is not UTF-8, which safetensors needs")
    # os.path, because Path's own tests raise if a name is too long or may not be looked up
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"--out {out}: is a file; name a directory")
    for name, source in (("base", options.base), ("init-adapter", options.init_adapter)):
        if source and os.path.isdir(source) and os.path.realpath(out) == os.path.realpath(source):
            raise UserError(f"--out {out}: is what --{name} reads; name another directory")
    present = [name for name in RUN_FILES if os.path.lexists(out / name)]
    if old := [name for name in OLD_CHECKPOINTS if name in present and not options.overwrite]:
        raise UserError(
            f"{out / old[0]}: an older version's checkpoint, which this one cannot "
            "read; --overwrite replaces the run, or name another directory"
        )
    if options.resume and not {RUN, CHECKPOINT, PREVIOUS, METRICS} & set(present):
        raise UserError(f"--resume: {out} holds no checkpoint; start without --resume")
    held = [name for name in present if name != METRICS or os.lstat(out / name).st_size]
    if held and not (options.resume or options.overwrite):
        raise UserError(
            f"--out {out}: holds a run ({held[0]}); --resume continues it, "
            "--overwrite replaces it, or name another directory"
        )


class RunDirectory:
    """Lock `--out` for this process: metrics.jsonl stays open and carries the lock.

    The system drops the lock when the process ends, however it ends. No symbolic link is followed:
    metrics.jsonl is opened without, and all other files are replaced by renaming. Raises UserError
    if the directory cannot be written or another run has it.
    """

    def __init__(self, out: Path):
        self.out, self.metrics = out, out / METRICS
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
        except OSError as error:  # some network file systems have no locks
            print(
                f"warning: {self.metrics}: cannot be locked ({error.strerror}); start no other "
                "run in that directory",
                file=sys.stderr,
            )

    def close(self) -> None:
        os.close(self.file)

    def clear(self) -> None:
        """Remove an earlier run."""
        for name in RUN_FILES:
            if name != METRICS:
                (self.out / name).unlink(missing_ok=True)
        os.ftruncate(self.file, 0)

    def check(self) -> None:
        """Raise RunError if this is no longer the directory in which the run began."""
        try:
            same = os.path.samestat(os.fstat(self.file), os.lstat(self.metrics))
        except OSError:
            same = False
        if not same:
            raise RunError(
                f"{self.metrics}: has vanished or was replaced while the run was writing it"
            )

    def append(self, metrics: dict) -> None:
        """Add a line to `metrics.jsonl`. JSON has no infinity: the gradient norm of an fp16 step
        that overflowed is null.
        """
        self.check()
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = (json.dumps(finite) + "\n").encode()
        try:
            while line:  # a full disk may take only a part of it
                line = line[os.write(self.file, line) :]
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot be written ({error.strerror})") from error

    def sync(self) -> None:
        """Bring the metrics to the disk, before a checkpoint whose steps are not run again."""
        self.check()
        os.fsync(self.file)

    def cut(self, step: int) -> None:
        """Drop the lines of steps after `step`, which are run again, and any half-written line."""
        length = 0
        with suppress(ValueError):
            for line in self.metrics.read_bytes().splitlines(keepends=True):
                if json.loads(line)["step"] > step:
                    break
                length += len(line)
        os.ftruncate(self.file, length)
