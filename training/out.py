"""Refuse an `--out` that contains other files, and recognise a finished run."""

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from lora.save import WEIGHTS as ADAPTER_WEIGHTS
from storage.runs import RUN, read_run
from storage.weights import WEIGHTS as MODEL_WEIGHTS
from training.checkpoint import CHECKPOINT, PREVIOUS
from training.directory import METRICS, RUN_FILES, RUN_ONLY
from training.identity import refuse_another_run
from training.options import Options
from training.plan import Plan


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
    run, an input of this run, or other files with the names that a run writes.
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
