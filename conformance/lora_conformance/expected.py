"""Expected failures and the verdict of a run, for the bench and for `compare`."""

from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path

LEVELS = ("mathematics", "robustness", "interface")  # of a check


def read_expected(path: Path | None, known: Container[str]) -> set[str]:
    """Return the names in a file with one name per line, where # begins a comment.

    Raise ValueError for a name that is not known, because it expects nothing.
    """
    if path is None:
        return set()
    names = set()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name = line.partition("#")[0].strip()
        if name and name not in known:
            raise ValueError(f"{path}, line {number}: there is no {name!r}")
        if name:
            names.add(name)
    return names


def judged(outcome: str, expected: bool, required: bool = False) -> str:
    """Return the outcome, or if a failure was expected: "xfail", "XPASS" or "XSKIP". A required
    result that is skipped or refused fails."""
    if required and outcome in ("skip", "refused"):
        return "FAIL"
    if not expected:
        return outcome
    return {"FAIL": "xfail", "pass": "XPASS"}.get(outcome, "XSKIP")


def summary(outcomes: Iterable[str]) -> tuple[str, bool]:
    """Return a line of counts, and whether the run succeeded. A run without a pass does not."""
    counts = Counter(outcomes)
    words = {"pass": "passed", "FAIL": "failed", "refused": "refused", "skip": "skipped"}
    shown = [one for one in words if one != "refused" or counts[one]]
    line = ", ".join(f"{counts[outcome]} {words[outcome]}" for outcome in shown)
    if counts["xfail"]:
        line += f", {counts['xfail']} failed as expected"
    if counts["XPASS"]:
        line += f", {counts['XPASS']} passed although a failure was expected"
    if counts["XSKIP"]:
        line += f", {counts['XSKIP']} skipped although a failure was expected"
    if not counts.keys() - {"skip", "refused"}:
        line += ": nothing passed, so the run fails"
    return line, bool(counts["pass"]) and not counts["FAIL"] and not counts["XPASS"]
