"""The register of tables, and numbers of stored results.

`Runs` are the results of the seeds by rate, with rates as text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from common.figures import scientific
from common.files import read_json
from lesson.experiments.common import read_results, spread
from lesson.experiments.sweep import best_rate
from training.options import ROOT

Runs = dict[str, list[float]]
Lines = Callable[[], Iterator[str]]
TABLES: dict[str, Lines] = {}  # by the name in the mark above the table


def table(lines: Lines) -> Lines:
    """Register a generator of a table's lines under its name."""
    TABLES[lines.__name__] = lines
    return lines


def results(name: str) -> Any:
    """Return the results in docs/figures/NAME.json."""
    return read_results(ROOT / "docs" / "figures" / f"{name}.json")


def benchmark(name: str) -> Any:
    """Return the stored result of a benchmark. A processor's name may follow in the file's name."""
    [path] = (ROOT / "benchmarks" / "results").glob(f"{name}*.json")
    return read_json(path)


def at_best(runs: Runs) -> float:
    """Return the mean at the best rate."""
    return mean(runs[best_rate(runs)])


def range_at_best(runs: Runs) -> str:
    """Print the mean at the best rate, and (min .. max)."""
    return spread(runs[best_rate(runs)])


def gap(runs: Runs, full: Runs) -> float:
    """Return the loss at the best rate minus the loss of full fine-tuning, in nats."""
    return math.log(at_best(runs) / at_best(full))


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each column."""
    return [mean(column) for column in zip(*rows, strict=True)]


def rate(lr: float | str, digits: int = 2) -> str:
    """Print a rate, such as 2.7e-3."""
    return scientific(float(f"{float(lr):.{digits}g}"))
