"""Is `--recipe best` safe on texts that it was not fitted to?
`python -m lesson.experiments.texts [FILE ...]`

Varied: the text, the recipe, and the rate.
Fixed: mini in fp32, one epoch, seed 42, and every other option of `train.py`.
Measured: the perplexity of the last tenth of the text, by the base, by `--recipe reference`, by
`--recipe best`, and by `best` at the best fixed rate of a ladder whose rates differ by a factor of
2. The book has also a run of `best` with three epochs, the default.

Each FILE is a text beside the texts of `TEXTS`. Its name, size and hash are stored, not the text.
"""

import argparse
import inspect
import math
import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.files import file_sha256
from lesson.experiments.common import as_command, experiment, train_options
from lesson.experiments.sweep import stored
from training.options import BEST, BOOK, REFERENCE, ROOT

FITTED = ("the book", "White Fang, 40 KB", "documentation")  # and two texts that have no row
LATIN = ROOT / "benchmarks" / "pseudo-latin.txt"


def documentation() -> str:
    """Return the beginning of Python's documentation topics."""
    topics = sorted(pydoc_data.topics.topics.items())
    return "\n\n".join(text for _, text in topics)[:30_000]


def code() -> str:
    """Return the beginning of the sources of Python's argparse."""
    return inspect.getsource(argparse)[:20_000]


TEXTS: dict[str, Path | Callable[[], str]] = {
    "the book": BOOK,
    "pseudo-Latin": LATIN,
    "documentation": documentation,
    "code": code,
}


def run(text: Path, epochs: int, recipe: str, short: bool, lr: float | None = None) -> Any:
    """Return the result of a run. A stored result is returned at once."""
    source = "data" if text.suffix == ".jsonl" else "book"
    words: dict[str, Any] = {source: text, "epochs": epochs, "recipe": recipe}
    if lr:
        words["lr"] = lr
    if short:
        words["max_steps"] = 4
    words |= {"device": "cpu", "precision": "fp32"}
    return stored(train_options("lora", words), short)


def ladder(text: Path, epochs: int, middle: float, short: bool) -> dict[float, float]:
    """Return perplexities by rate. The best rate has a neighbour on each side."""
    found: dict[float, float] = {}
    nearest = 1e-3 * 2.0 ** round(math.log2(middle / 1e-3))
    missing = [nearest]
    while missing:
        found[missing[0]] = run(text, epochs, BEST, short, missing[0])["perplexity"]
        best = min(found, key=found.__getitem__)
        missing = [] if short else [x for x in (best / 2, best * 2) if x not in found]
    return dict(sorted(found.items()))


def results(text: Path, short: bool) -> dict[str, Any]:
    """Return a text's size and hash, and the perplexities and rates of one epoch."""
    best = run(text, 1, BEST, short)
    found = {
        "bytes": text.stat().st_size,
        "sha256": file_sha256(text),
        "base": best["base"],
        "reference": run(text, 1, REFERENCE, short)["perplexity"],
        "best": best["perplexity"],
        "lr": best["lr"],
        "ladder": ladder(text, 1, best["lr"], short),
    }
    print(f"{text.stem}: {found}", flush=True)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results by text. The first are texts of this project and of Python."""
    data: dict[str, Any] = {"the book, 3 epochs": run(BOOK, 3, BEST, args.short)}
    with TemporaryDirectory() as folder:
        for name, text in TEXTS.items():
            if not isinstance(text, Path):
                path = Path(folder) / f"{name}.txt"
                path.write_text(text())
                text = path
            data[name] = results(text, args.short)
        for path in args.files:
            data[path.stem] = results(path, args.short)
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("texts", measure, None, __doc__, argv, files=True)


if __name__ == "__main__":
    as_command(main)
