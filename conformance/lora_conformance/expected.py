"""Expected failures and the verdict of a run, for the bench and for `compare`."""

from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path


def read_expected(path: Path, known: Container[str]) -> set[str]:
    """Return the names in a file with one name per line, where # begins a comment.

    Raise ValueError for a name that is not known, because it expects nothing.
    """
    names = set()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name = line.partition("#")[0].strip()
        if name and name not in known:
            raise ValueError(f"{path}, line {number}: there is no {name!r}")
        if name:
            names.add(name)
    return names


def judged(outcome: str, expected: bool) -> str:
    """Return the outcome, or if a failure was expected: "xfail", "XPASS" or "XSKIP"."""
    return {"FAIL": "xfail", "pass": "XPASS", "skip": "XSKIP"}[outcome] if expected else outcome


def summary(outcomes: Iterable[str]) -> tuple[str, bool]:
    """Return a line of counts, and whether the run succeeded. A run without a pass does not."""
    counts = Counter(outcomes)
    line = f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped"
    if counts["xfail"]:
        line += f", {counts['xfail']} failed as expected"
    if counts["XPASS"]:
        line += f", {counts['XPASS']} passed although a failure was expected"
    if counts["XSKIP"]:
        line += f", {counts['XSKIP']} skipped although a failure was expected"
    if not counts["pass"] and not counts["FAIL"]:
        line += ": nothing passed, so the run fails"
    return line, bool(counts["pass"]) and not counts["FAIL"] and not counts["XPASS"]
