"""Put implementations on the bench, and write their rows of `results/results.md`.

python -m generators.results results/bench_NAME.py ...

It writes the counts and the failed checks. The other cells are written by hand. A row is found by
the package that the first line of the file tells to install.
"""

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lora_conformance.__main__ import load_implementation
from lora_conformance.bench import Result, run
from lora_conformance.checks import CHECKS
from lora_conformance.expected import LEVELS

PAGE = Path(__file__).resolve().parents[1] / "results" / "results.md"
OUTCOMES = ("pass", "FAIL", "refused", "skip")


def cells(results: Sequence[Result]) -> list[str]:
    """Return the counts of each level, and the names of the failed checks."""
    counts = []
    failed = []
    for level in LEVELS:
        of_level = [result for result in results if result.check.level == level]
        outcomes = [result.outcome for result in of_level]
        counts.append(" / ".join(str(outcomes.count(outcome)) for outcome in OUTCOMES))
        names = [f"`{one.check.name}`" for one in of_level if one.outcome == "FAIL"]
        if names:
            failed.append(f"{level}: {', '.join(names)}")
    return [*counts, "; ".join(failed)]


def write(page: str, package: str, new: Sequence[str]) -> str:
    """Return the page with the new cells in the row of a package, before its last cell."""
    [row] = re.findall(rf"^\| {re.escape(package)} \|.*$", page, re.MULTILINE)
    old = row.split(" | ")
    return page.replace(row, " | ".join([*old[: -len(new) - 1], *new, old[-1]]))


def main(argv: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    for path in argv:
        functions = load_implementation(path)
        name = "this project"
        if found := re.search(r"pip install ([\w-]+)", functions.__doc__ or ""):
            name = found[1]
        new = cells(run(functions, CHECKS))
        PAGE.write_text(write(PAGE.read_text(), name, new))
        print(f"{name}: {', '.join(new)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
