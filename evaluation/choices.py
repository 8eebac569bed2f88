"""Answer multiple-choice questions with the likeliest choice, and count the right answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.cli import print_table
from common.device import Device
from common.errors import RunError, UserError
from data.instructions import Instructions, make_row
from data.json_lines import read_lines
from data.questions import Question, question
from data.tokenizer import Tokenizer
from data.windows import split
from model.gpt2 import GPT2, IGNORE_INDEX


class Task(NamedTuple):
    """A question, and its choices as rows of `Instructions`."""

    question: Question
    rows: list[np.ndarray]


def score_questions(
    path: Path,
    fraction: float,
    block_size: int,
    model: GPT2,
    tokenizer: Tokenizer,
    device: Device,
) -> dict[str, Any]:
    """Answer the last `fraction` of a file's questions. Print and return the share of right
    answers."""
    tasks = split(read_tasks(path, tokenizer, block_size), fraction)[1]
    if not tasks:
        raise UserError(f"{path}: 0 questions; nothing to choose")
    by_sum = []
    by_mean = []
    for task in tasks:
        sums, counts = score_choices(model, task, device)
        by_sum.append(int(sums.argmax()))
        by_mean.append(int((sums / counts).argmax()))
    report = summary([task.question for task in tasks], by_sum, by_mean)
    print_summary(path, report)
    return {"text": str(path), "val_fraction": fraction, **report}


def read_tasks(path: Path, tokenizer: Tokenizer, block_size: int) -> list[Task]:
    """Read a file of questions. Each choice becomes a whole answer, with an end-of-text token.

    If a choice does not fit into a block, the beginning of the prompt is cut, by the same number of
    tokens for all choices of the question. Raises UserError, with the line's number, for a line
    that is not a question, and for a choice that alone is longer than a block.
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
def score_choices(model: GPT2, task: Task, device: Device) -> tuple[Tensor, Tensor]:
    """Return two tensors (choices,): the log p of each choice, and its number of tokens.

    The log p of a choice is the sum over its tokens, in fp64.
    """
    all_rows = np.arange(len(task.rows))
    inputs, targets = Instructions(task.rows).inputs_and_targets(all_rows)  # (choices, T)
    with device.autocast():
        losses, _ = model.token_losses(device.to_device(inputs), device.to_device(targets))
    sums = -losses.cpu().double().sum(1)
    if not sums.isfinite().all():
        raise RunError("a choice's log-probability is not finite; try --precision fp32")
    return sums, (targets != IGNORE_INDEX).sum(1)


def summary(
    questions: Sequence[Question], by_sum: Sequence[int], by_mean: Sequence[int]
) -> dict[str, Any]:
    """Return the accuracy of the model, of guessing, and of always giving the commonest answer.

    If all questions have the same choices, `confusion[i][j]` counts the questions with right choice
    i where choice j has the largest summed log p.
    """
    answers = np.array([one.answer for one in questions])
    labels = questions[0].choices
    report: dict[str, Any] = {
        "questions": len(questions),
        "accuracy_sum": np.mean(answers == by_sum).item(),
        "accuracy_mean": np.mean(answers == by_mean).item(),
        "chance": np.mean([1 / len(one.choices) for one in questions]).item(),
        "majority": np.bincount(answers).max().item() / len(questions),
    }
    if all(one.choices == labels for one in questions):
        table = [[0] * len(labels) for _ in labels]
        for answer, choice in zip(answers, by_sum, strict=True):
            table[answer][choice] += 1
        report["choices"] = list(labels)
        report["confusion"] = table
    return report


def print_summary(source: Path, report: dict[str, Any]) -> None:
    print(
        f"{source}: {report['questions']:,} questions; chance {report['chance']:.1%}, "
        f"the commonest answer {report['majority']:.1%}"
    )
    print(
        f"accuracy {report['accuracy_sum']:.1%} by the summed log-probability, "
        f"{report['accuracy_mean']:.1%} by the mean per token"
    )
    if "confusion" in report:
        labels = [" ".join(label.split()) for label in report["choices"]]  # no line breaks
        rows = []
        for label, counts in zip(labels, report["confusion"], strict=True):
            rows.append([label, *map(str, counts)])
        print_table(["answer, and what was chosen", *labels], rows)
