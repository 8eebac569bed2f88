"""The blind comparison of two assistants: `python -m lesson.examples.pairs`."""

import io
import json
import re
import sys

import pytest

from lesson.examples import pairs
from tests.runs import run


def write(path, answers, questions=None):
    """Write answers to "question 0", "question 1", ... as JSON lines. Return the path."""
    lines = []
    for i, answer in enumerate(answers):
        question = questions[i] if questions else f"question {i}"
        lines.append(json.dumps({"prompt": question, "completion": answer}) + "\n")
    path.write_text("".join(lines))
    return path


def vote(monkeypatch, text, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run(pairs.main, *argv)


def counts(ending):
    """Return the printed counts: ONE, OTHER, ties, and the p-value."""
    assert ending.status == 0, ending
    [found] = re.findall(
        r"better: \S+ (\d+), \S+ (\d+), ties (\d+)\ntwo-sided .* p = (\S+)", ending.stdout
    )
    return [float(value) for value in found]


def test_votes_for_the_first_answer_count_for_the_file_that_was_shown_first(tmp_path, monkeypatch):
    files = [write(tmp_path / f"{name}.jsonl", 24 * [name]) for name in ("one", "other")]
    said = vote(monkeypatch, 24 * "1\n", *files)
    first = re.findall(r"^1: (\w+)$", said.stdout, re.MULTILINE)
    assert set(first) == {"one", "other"}  # a random order
    assert counts(said)[:3] == [first.count("one"), first.count("other"), 0]
    assert said.stdout == vote(monkeypatch, 24 * "1\n", *files).stdout
    assert said.stdout != vote(monkeypatch, 24 * "1\n", *files, "--seed", 1).stdout

    # Always vote for "one".
    right = "".join("1\n" if name == "one" else "2\n" for name in first)
    assert counts(vote(monkeypatch, right, *files)) == [24, 0, 0, pytest.approx(2**-23, rel=0.1)]


def test_the_sign_test_is_the_exact_binomial():
    assert pairs.sign_test(15, 5) == pytest.approx(0.04138947)  # scipy: binomtest(15, 20)
    assert pairs.sign_test(3, 3) == pairs.sign_test(0, 0) == 1
    assert pairs.sign_test(2, 9) == pairs.sign_test(9, 2)
