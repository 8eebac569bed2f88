"""Every file of a stopped run damaged in turn: no difference goes unnoticed.

Each is cut, zeroed, changed in one bit, or replaced by another run's. Then the run is resumed or
overwritten, or a text is scored with the damaged token cache. The command must write the same bytes
as without damage, or one line that names the file, with status 2.
"""

import contextlib
import io
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import evaluate
import train
from data.tokens import CACHE
from tests.fault.runs import BOOK, Outcome, differences, result, scratch
from tests.helpers import drawing, tiny_gpt2_directory
from tests.runs import Ending, Moment, arguments, contents, run, run_acting
from training.checkpoint import CHECKPOINT, PREVIOUS

METHODS = ("lora", "full")
OPTIONS = ("--max-steps", 6, "--eval-every", 2, "--checkpoint-every", 2, "--lr", 3e-3)
STOP = 4  # in this step, after which a checkpoint is saved; the one before is of step 2


class Damage(NamedTuple):
    """A way to spoil a file's bytes, given the bytes of another run's file of the same name."""

    name: str
    spoil: Callable[[Random, bytes, bytes], bytes]


def flip_bit(rng: Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    place = rng.choice((rng.randrange(len(data)), rng.randrange(min(400, len(data)))))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES = (
    Damage("cut", lambda rng, data, other: data[: rng.randrange(1, len(data))]),
    Damage("zeroed", lambda rng, data, other: bytes(len(data))),
    Damage("one bit", flip_bit),
    Damage("another run's", lambda rng, data, other: other),
)


MORE_BITS = [DAMAGES[2]] * 29  # in the long form

# A resumed run verifies what it reads. It does not look at the other files of an unfinished run.
RESUMED_FROM = {CHECKPOINT, PREVIOUS, "run.json"}


class Material(NamedTuple):
    """Hold what each trial starts from: a base, a book, and the runs of one method."""

    method: str
    folder: Path
    base: Path
    book: Path

    @property
    def whole(self) -> Path:
        return self.folder / f"{self.method}-whole"

    @property
    def stopped(self) -> Path:
        return self.folder / f"{self.method}-stopped"

    @property
    def other(self) -> Path:
        return self.folder / f"{self.method}-other"

    def command(self, out: Path, *more: object) -> list[str]:
        return arguments(self.method, self.base, self.book, out, *OPTIONS, *more)


def campaign(short: bool, seed: int) -> Iterator[Outcome]:
    rng = Random(seed)
    damages = DAMAGES if short else (*DAMAGES, *MORE_BITS)
    with scratch() as folder, drawing(lambda: False):
        base, _ = tiny_gpt2_directory(folder / "base", n_embd=16, n_layer=1, n_head=2)
        book = folder / "book.txt"
        book.write_text(f"{seed}: {BOOK[:6000]}")
        before = set(CACHE.glob("*"))
        for method in METHODS:
            material = Material(method, folder, base, book)
            prepare(material)
            yield damaged_runs(material, "--resume", damages, len(damages), rng)
            yield damaged_runs(material, "--overwrite", DAMAGES, 1 if short else 4, rng)
        caches = set(CACHE.glob("*")) - before
        yield damaged_cache(material, caches, damages, rng)


def prepare(material: Material) -> None:
    """Train one run to the end, stop another like it half-way, and stop one of other options."""
    ending = run(train.main, *material.command(material.whole))
    assert ending.status == 0, ending.stderr

    def stop(moment: Moment) -> None:
        signal.raise_signal(signal.SIGTERM)

    for out, more in ((material.stopped, ()), (material.other, ("--seed", 1, "--lr", 1e-3))):
        ending = run_acting({STOP: stop}, *material.command(out, *more))
        assert ending.status == 128 + signal.SIGTERM, ending.stderr


def damaged_runs(
    material: Material, option: str, damages: tuple[Damage, ...], each: int, rng: Random
) -> Outcome:
    """Give each file of the stopped run the next `each` damages; resume or overwrite."""
    turns = cycle(damages)
    done = {"--resume": "resumed", "--overwrite": "overwritten"}[option]
    outcome = Outcome(f"{material.method}, {done}")
    expected = result(material.whole)
    for name, good, other in files_of(material):
        if option == "--resume" and name not in RESUMED_FROM:
            continue
        for damage in islice(turns, each):
            out = material.folder / "run"
            shutil.copytree(material.stopped, out)
            (out / name).write_bytes(damage.spoil(rng, good, other))
            problems = try_command(material.command(out, option), out, name, expected)
            outcome.add(f"{name}, {damage.name}", problems)
            shutil.rmtree(out)
    return outcome


def files_of(material: Material) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield each file's name, its bytes, and the bytes of another run's file.

    A stopped run has no run.json. If there is one, another run wrote it.
    """
    for path in sorted(material.stopped.iterdir()):
        yield path.name, path.read_bytes(), (material.other / path.name).read_bytes()
    report = (material.whole / "run.json").read_bytes()
    another = report.replace(b'"seed": 42', b'"seed": 43')
    yield "run.json", another, another


def try_command(command: list[str], out: Path, name: str, expected: dict) -> list[str]:
    """Return what is wrong with how the command meets the damaged file."""
    damaged = contents(out)
    ending = end(train.main, command)
    if ending.status == 0:
        if contents(out) == damaged:
            return ["the command found nothing to do"]
        return differences(out, expected)
    return said_in_one_line(ending, name) + [
        f"{file} was changed by a command that was refused"
        for file, data in contents(out).items()
        if damaged.get(file) != data
    ]


def damaged_cache(
    material: Material, caches: set[Path], damages: tuple[Damage, ...], rng: Random
) -> Outcome:
    """Damage the book's cached tokens; score the book again."""
    outcome = Outcome("token cache, scored")
    command = ["--base", material.base, "--text", material.book, "--block-size", 16]
    expected = end(evaluate.main, command)
    other = material.folder / "other.txt"
    other.write_text("Another book. " * 200)
    known = set(CACHE.glob("*"))
    run(evaluate.main, *command, "--text", other)
    [another] = set(CACHE.glob("*")) - known

    for path in sorted(caches):
        good = path.read_bytes()
        for damage in damages:
            path.write_bytes(damage.spoil(rng, good, another.read_bytes()))
            ending = end(evaluate.main, command)
            same = ending.status == 0 and ending.stdout.endswith(expected.stdout)
            problems = [] if same else said_in_one_line(ending, path.name)
            outcome.add(damage.name, problems)
    for path in (*caches, another):
        path.unlink(missing_ok=True)
    return outcome


def said_in_one_line(ending: Ending, name: str) -> list[str]:
    """Return what is wrong unless one line refuses, and names the file."""
    lines = ending.stderr.splitlines()
    if ending.status == 2 and len(lines) == 1 and name in lines[0]:
        return []
    return [f"exit status {ending.status}, {ending.stdout[-60:]!r}, {lines[-3:]}"]


def end(main: Callable, command: list) -> Ending:
    """Run the command; an error that it did not expect is an ending, too."""
    try:
        return run(main, *command)
    except BaseException as error:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            traceback.print_exception(error)
        return Ending(1, "", said.getvalue())
