"""Damage every file of a stopped run in turn: every difference is noticed.

Each file is cut, zeroed, changed in one bit, or replaced by another run's file. Then the run is
resumed or overwritten. The command must write the same bytes as without damage, or one line that
names the file, with status 2.
"""

import contextlib
import io
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random

import train
from tests.fault.runs import BOOK, Outcome, differences, result, scratch
from tests.helpers import drawing, tiny_gpt2_directory
from tests.runs import Ending, arguments, contents, run, run_acting
from training.checkpoint import CHECKPOINT, PREVIOUS

OPTIONS = ("--max-steps", 6, "--eval-every", 2, "--checkpoint-every", 2, "--lr", 3e-3)
STOP = 4  # the step of the stop, with a checkpoint. The previous checkpoint is of step 2
BITS = 30  # bits to flip in each file, one at a time, in the long form


def flip_bit(rng: Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    place = rng.choice((rng.randrange(len(data)), rng.randrange(min(400, len(data)))))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


# Ways to damage a file's bytes, given the bytes of another run's file with the same name.
DAMAGES = {
    "cut": lambda rng, data, other: data[: rng.randrange(1, len(data))],
    "zeroed": lambda rng, data, other: bytes(len(data)),
    "another run's": lambda rng, data, other: other,
    "one bit": flip_bit,
}


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    rng = Random(seed)
    names = [*DAMAGES, *["one bit"] * (0 if short else BITS - 1)]
    with scratch() as folder, drawing(lambda: False):
        base, _ = tiny_gpt2_directory(folder / "base", n_embd=16, n_layer=1, n_head=2)
        book = folder / "book.txt"
        book.write_text(f"{seed}: {BOOK[:6000]}")
        for method in ("lora", "full"):
            yield damaged_runs(method, base, book, folder / method, names, rng)


def damaged_runs(
    method: str, base: Path, book: Path, folder: Path, names: list[str], rng: Random
) -> Outcome:
    """Damage each file that --resume reads, and resume. Damage all files, and overwrite."""

    def command(out: Path, *more: object) -> list[str]:
        return arguments(method, base, book, out, *OPTIONS, *more)

    def stop(moment: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    whole, stopped, other, out = (folder / x for x in ("whole", "stopped", "other", "run"))
    assert run(train.main, *command(whole)).status == 0
    for place, more in ((stopped, ()), (other, ("--seed", 1, "--lr", 1e-3))):
        assert run_acting({STOP: stop}, *command(place, *more)).status == 128 + signal.SIGTERM

    outcome = Outcome(f"{method}, resumed or overwritten")
    expected = result(whole)
    good = contents(stopped)
    another = contents(other)
    # A stopped run has no run.json, so any run.json was written by another run.
    report = (whole / "run.json").read_bytes().replace(b'"seed": 42', b'"seed": 43')
    good["run.json"] = another["run.json"] = report

    for file in (CHECKPOINT, PREVIOUS, "run.json"):  # a resumed run reads no other file
        for name in names:
            shutil.copytree(stopped, out)
            (out / file).write_bytes(DAMAGES[name](rng, good[file], another[file]))
            outcome.add(
                f"{file}, {name}", try_command(command(out, "--resume"), out, file, expected)
            )
            shutil.rmtree(out)

    for name in DAMAGES:
        shutil.copytree(stopped, out)
        for file in good:
            (out / file).write_bytes(DAMAGES[name](rng, good[file], another[file]))
        outcome.add(f"all, {name}", try_command(command(out, "--overwrite"), out, "run", expected))
        shutil.rmtree(out)
    return outcome


def try_command(command: list[str], out: Path, name: str, expected: dict) -> list[str]:
    """Return the problems of running the command on the damaged file."""
    damaged = contents(out)
    ending = end(command)
    if ending.status == 0:
        if contents(out) == damaged:
            return ["the command found nothing to do"]
        return differences(out, expected)
    return said_in_one_line(ending, name) + [
        f"{file} was changed by a command that was refused"
        for file, data in contents(out).items()
        if damaged.get(file) != data
    ]


def said_in_one_line(ending: Ending, name: str) -> list[str]:
    """Return a problem unless one line refuses the file by its name."""
    lines = ending.stderr.splitlines()
    if ending.status == 2 and len(lines) == 1 and name in lines[0]:
        return []
    return [f"exit status {ending.status}, {ending.stdout[-60:]!r}, {lines[-3:]}"]


def end(command: list) -> Ending:
    """Run `train.py`. An unexpected exception also counts as an ending."""
    try:
        return run(train.main, *command)
    except BaseException as error:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            traceback.print_exception(error)
        return Ending(1, "", said.getvalue())
