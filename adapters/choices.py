"""Score questions with choices: which choice a model finds likeliest, and how often rightly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.cli import print_table
from common.device import Device
from common.errors import RunError
from data.choices import Question, question
from data.instructions import Instructions, make_row
from data.json_lines import read_lines
from data.tokenizer import Tokenizer
from model.gpt2 import GPT2, IGNORE_INDEX


class Task(NamedTuple):
    """A question, and its choices as rows of `Instructions`."""

    question: Question
    rows: list[np.ndarray]


class Scored(NamedTuple):
    """A question, and log p of each choice: the sum over its tokens, and their number."""

    question: Question
    log_probabilities: Tensor
    tokens: Tensor

    def chosen(self, mean: bool = False) -> int:
        """Return the likeliest choice's place, by the sum or by the mean; the first of equals."""
        scores = self.log_probabilities / self.tokens if mean else self.log_probabilities
        return int(scores.argmax())


def read_tasks(path: Path, tokenizer: Tokenizer, block_size: int) -> list[Task]:
    """Read a file of questions. A choice is the assistant's whole answer, to its end of text.

    Where a choice does not fit into a block, all choices of the question lose the same part of the
    prompt's beginning. Raises UserError, naming the line, if it is not a question, or if a choice
    alone is longer than a block.
    """

    def read(example: dict) -> Task:
        asked = question(example)
        rows = []
        for choice in asked.choices:
            turns = [("User", asked.prompt), ("Assistant", choice)]
            rows.append(make_row(turns, tokenizer, block_size))
        cut = max(0, max(row.shape[1] for row in rows) - block_size)
        return Task(asked, [row[:, cut:] for row in rows])

    return read_lines(path, read)


@torch.no_grad()
def score_choices(
    model: GPT2, tasks: Sequence[Task], device: Device, batch_size: int = 16
) -> list[Scored]:
    """Return each question with log p of its choices, by a model in evaluation mode.

    Raises RunError if one is not finite.
    """
    rows = [row for task in tasks for row in task.rows]
    sums = []
    for inputs, targets in Instructions(rows).evaluation_batches(batch_size):
        with device.autocast():
            losses, _ = model.token_losses(device.to_device(inputs), device.to_device(targets))
        sums.append(-losses.cpu().double().sum(1))

    log_probabilities = torch.cat(sums)
    if not log_probabilities.isfinite().all():
        raise RunError("a choice's log-probability is not finite; try --precision fp32")
    tokens = torch.tensor([int((row[1] != IGNORE_INDEX).sum()) for row in rows])
    sizes = [len(task.rows) for task in tasks]
    parts = zip(tasks, log_probabilities.split(sizes), tokens.split(sizes), strict=True)
    return [Scored(task.question, total, count) for task, total, count in parts]


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the share of right choices, what guessing and the commonest answer would reach and, if
    all questions have the same choices, how often each answer (row) got each choice (column).

    That table, `confusion`, is by the sum.
    """
    answers = [one.question.answer for one in scored]
    by_sum = [one.chosen() for one in scored]
    by_mean = [one.chosen(mean=True) for one in scored]
    chances = [1 / len(one.question.choices) for one in scored]
    report: dict[str, Any] = {
        "questions": len(scored),
        "accuracy_sum": _share_equal(by_sum, answers),
        "accuracy_mean": _share_equal(by_mean, answers),
        "chance": sum(chances) / len(chances),
        "majority": max(map(answers.count, answers)) / len(answers),
    }
    labels = scored[0].question.choices
    if all(one.question.choices == labels for one in scored):
        table = [[0] * len(labels) for _ in labels]
        for answer, choice in zip(answers, by_sum, strict=True):
            table[answer][choice] += 1
        report["choices"] = list(labels)
        report["confusion"] = table
    return report


def _share_equal(chosen: Sequence[int], answers: Sequence[int]) -> float:
    right = sum(a == b for a, b in zip(chosen, answers, strict=True))
    return right / len(answers)


def print_summary(source: str, report: dict[str, Any]) -> None:
    print(
        f"{source}: {report['questions']:,} questions; chance {report['chance']:.1%}, "
        f"the commonest answer {report['majority']:.1%}"
    )
    print(
        f"accuracy {report['accuracy_sum']:.1%} by the summed log-probability, "
        f"{report['accuracy_mean']:.1%} by the mean per token"
    )
    if "confusion" in report:
        labels = [" ".join(label.split()) for label in report["choices"]]  # a row is one line
        rows = []
        for label, counts in zip(labels, report["confusion"], strict=True):
            rows.append([label, *map(str, counts)])
        print_table(["answer, and what was chosen", *labels], rows)
