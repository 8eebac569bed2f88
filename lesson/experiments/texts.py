"""Is `--recipe best` safe on texts that it was not fitted to?
`python -m lesson.experiments.texts [FILE ...]`

Varied: the text, the recipe, the epochs, and the rate.
Fixed: mini in fp32, seed 42, and every other option of `train.py`.
Measured: the perplexity of the last tenth of the text, by the base, by `--recipe reference`, by
`--recipe best`, and by `best` at other rates: the rule's rate, 4e-3, and the best of a ladder whose
rates differ by a factor of 2. Where `best` is more than 2 % above the ladder, seeds 43 and 44
repeat `best` and the ladder's best rate.

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
from lesson.experiments.rates import rate_of_the_rule
from lesson.experiments.sweep import stored
from training.options import BEST, BOOK, REFERENCE, ROOT

# How often short runs read their windows was chosen on these texts.
FITTED = (
    "the book",
    "documentation",
    "code",
    "conversations",
    "White Fang, 40 KB",
    "The Time Machine, 80 KB",
    "Flatland, 20 KB",
    "GPL 3, 35 KB",
)
# The largest text, in bytes, by the epochs of a run.
LARGEST = {1: 500_000, 3: 500_000, 10: 81_000}
# The largest epochs x bytes with `reference`, which reads eight times as many windows as `best`.
MOST_OF_REFERENCE = 1_000_000
FIXED = 4e-3


def documentation() -> str:
    """Return the beginning of Python's documentation topics."""
    topics = sorted(pydoc_data.topics.topics.items())
    return "\n\n".join(text for _, text in topics)[:30_000]


def code() -> str:
    """Return the beginning of the sources of Python's argparse."""
    return inspect.getsource(argparse)[:20_000]


TEXTS: dict[str, Path | Callable[[], str]] = {
    "the book": BOOK,
    "documentation": documentation,
    "code": code,
    "conversations": ROOT / "data" / "instructions.jsonl",
}


class Text:
    """A text, and the results of runs on it. A stored result is returned at once."""

    def __init__(self, path: Path):
        self.path = path

    def options(self, epochs: int, recipe: str, lr: float | None = None, seed: int = 42) -> Any:
        source = "data" if self.path.suffix == ".jsonl" else "book"
        words: dict[str, Any] = {source: self.path, "epochs": epochs, "recipe": recipe}
        words["seed"] = seed
        if lr:
            words["lr"] = lr
        return train_options("lora", words | {"device": "cpu", "precision": "fp32"})

    def run(self, epochs: int, recipe: str = BEST) -> Any:
        return stored(self.options(epochs, recipe))

    def perplexity(self, epochs: int, lr: float | None, seed: int = 42) -> float:
        """Return the perplexity of `best`, at this rate, or else at the rate that it finds."""
        return stored(self.options(epochs, BEST, lr, seed))["perplexity"]

    def ladder(self, epochs: int, middle: float) -> dict[float, float]:
        """Return perplexities by rate. The best rate has a neighbour on each side."""
        found: dict[float, float] = {}
        missing = [1e-3 * 2.0 ** round(math.log2(middle / 1e-3))]
        while missing:
            found[missing[0]] = self.perplexity(epochs, missing[0])
            best = min(found, key=found.__getitem__)
            missing = [x for x in (best / 2, best * 2) if x not in found]
        return dict(sorted(found.items()))

    def results(self, epochs: int) -> dict[str, Any]:
        """Return the perplexities and rates of runs with this number of epochs."""
        best = self.run(epochs)
        found = {"base": best["base"], "best": best["perplexity"], "lr": best["lr"]}
        if epochs * self.path.stat().st_size <= MOST_OF_REFERENCE:
            found["reference"] = self.run(epochs, REFERENCE)["perplexity"]
        if epochs < 10:
            found["rule"] = self.perplexity(epochs, rate_of_the_rule(self.options(epochs, BEST)))
            found["fixed"] = self.perplexity(epochs, FIXED)
        found["ladder"] = ladder = self.ladder(epochs, best["lr"])
        least = min(ladder, key=ladder.__getitem__)
        if best["perplexity"] > 1.02 * ladder[least]:
            for name, lr in (("best again", None), ("ladder again", least)):
                found[name] = [self.perplexity(epochs, lr, seed) for seed in (43, 44)]
        return found


def all_results(path: Path) -> dict[str, Any]:
    """Return a text's size and hash, and its results by epochs."""
    size = path.stat().st_size
    text = Text(path)
    lengths = [epochs for epochs in LARGEST if size <= LARGEST[epochs]]
    found = {str(epochs): text.results(epochs) for epochs in lengths}
    print(f"{path.stem}: {found}", flush=True)
    return {"bytes": size, "sha256": file_sha256(path), **found}


def measure(*files: Path) -> dict[str, Any]:
    """Return the results by text. The first are texts of this project and of Python."""
    data: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for name, text in TEXTS.items():
            if not isinstance(text, Path):
                path = Path(folder) / f"{name}.txt"
                path.write_text(text())
                text = path
            data[name] = all_results(text)
        for path in files:
            data[path.stem] = all_results(path)
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("texts", measure, None, __doc__, argv, files=True)


if __name__ == "__main__":
    as_command(main)
