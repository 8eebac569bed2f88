"""Choices: log-probabilities against a plain transformers loop, accuracy, confusion, refusals."""

import json
import math
from pathlib import Path

import pytest
import torch

import evaluate
import train
from common.device import Device
from common.errors import RunError
from data.instructions import read_examples
from data.questions import Question
from evaluation.choices import print_summary, read_tasks, score_choices, summary
from storage.weights import load_gpt2
from tests import runs
from tests.helpers import TINY, refusal, small_tokenizer
from tests.runs import one_line, run, stock_model

CPU = Device.pick("cpu", "fp32")
TOKENIZER = small_tokenizer(TINY["vocab_size"])
QUESTIONS = [
    ("Who winds it?", ("Orla", "Jory and the goat", "…"), 1),
    (" Who\nasks? ", (" Orla ", "Orla Venn"), 1),
    ("", ("x", "y", "z", "zz"), 3),
    ("A question longer than the block of forty tokens: it loses its beginning", ("a", "bcd"), 0),
]


def line(prompt: str, choices: object, answer: object, **more: object) -> str:
    return json.dumps({"prompt": prompt, "choices": choices, "answer": answer} | more)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return written(tmp_path / "choices.jsonl", *(line(*each) for each in QUESTIONS))


@torch.no_grad()
def plain_score(model, prompt: str, choice: str, dropped: int) -> float:
    """Return log p of the answer and its end of text, token by token, without padding or batch."""
    before = TOKENIZER.encode(f"User: {prompt.strip()}\nAssistant:").astype(int).tolist()
    answer = [*TOKENIZER.encode(f" {choice.strip()}").astype(int).tolist(), TOKENIZER.end_of_text]
    ids = [*before, *answer][dropped:]
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(ids) - len(answer), len(ids)))


def test_scores_are_those_of_a_plain_transformers_loop(base, file, tmp_path):
    block = 40
    model = load_gpt2(base)
    theirs = stock_model(base)
    right_by_sum = []
    right_by_mean = []
    tasks = read_tasks(file, TOKENIZER, block)
    for (prompt, choices, answer), task in zip(QUESTIONS, tasks, strict=True):
        texts = [f"User: {prompt.strip()}\nAssistant: {choice.strip()}" for choice in choices]
        longest = max(len(TOKENIZER.encode(text)) for text in texts)
        dropped = max(0, longest - block)
        wanted = [plain_score(theirs, prompt, choice, dropped) for choice in choices]
        lengths = [len(TOKENIZER.encode(f" {choice.strip()}")) + 1 for choice in choices]
        sums, counts = score_choices(model, task, CPU)
        assert sums.tolist() == pytest.approx(wanted, abs=1e-5) and counts.tolist() == lengths
        means = [total / length for total, length in zip(wanted, lengths, strict=True)]
        right_by_sum.append(wanted.index(max(wanted)) == answer)
        right_by_mean.append(means.index(max(means)) == answer)

    found, _ = runs.scores(
        tmp_path / "scores.json", "--base", base, "--choices", file, "--block-size", block
    )
    assert found["accuracy_sum"] == sum(right_by_sum) / len(QUESTIONS)
    assert found["accuracy_mean"] == sum(right_by_mean) / len(QUESTIONS)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    assert found["majority"] == 0.5 and "confusion" not in found
    assert right_by_sum != right_by_mean

    argv = ("--base", base, "--choices", file, "--block-size", block, "--val-fraction", 0.25)
    last, _ = runs.scores(tmp_path / "last.json", *argv)
    assert last["questions"] == 1


def test_the_right_answers_are_what_data_trains_on(base, file, tmp_path):
    """--data reads the same file and measures the loss of the right answers."""
    pairs = [{"prompt": p, "completion": choices[answer]} for p, choices, answer in QUESTIONS]
    same = written(tmp_path / "pairs.jsonl", *map(json.dumps, pairs))
    rows = read_examples(file, TOKENIZER, 200)
    for row, other in zip(rows, read_examples(same, TOKENIZER, 200), strict=True):
        assert row.tolist() == other.tolist()

    model = load_gpt2(base)
    right = 0.0
    for task in read_tasks(file, TOKENIZER, 64):
        sums, _ = score_choices(model, task, CPU)
        right += sums[task.question.answer].item()
    argv = ("--base", base, "--data", file, "--block-size", 64)
    scores, _ = runs.scores(tmp_path / "scores.json", *argv)
    assert scores["loss"] * scores["tokens"] == pytest.approx(-right, rel=1e-5)


def test_the_summary_counts_right_answers_and_what_was_chosen(capsys):
    questions = [Question("Who?", ("salt", "night"), answer) for answer in (0, 1, 1, 1)]
    found = summary(questions, by_sum=[0, 1, 1, 0], by_mean=[1, 1, 0, 0])
    assert (found["questions"], found["chance"], found["majority"]) == (4, 0.5, 0.75)
    assert (found["accuracy_sum"], found["accuracy_mean"]) == (0.75, 0.25)
    assert found["choices"] == ["salt", "night"] and found["confusion"] == [[1, 0], [1, 2]]
    print_summary(Path("task.jsonl"), found)
    said = capsys.readouterr().out
    assert "task.jsonl: 4 questions; chance 50.0%, the commonest answer 75.0%" in said
    assert runs.table(said)[2:] == [["salt", "1", "0"], ["night", "1", "2"]]


def test_a_score_that_is_not_a_number_is_an_error(base, file):
    broken = load_gpt2(base)
    broken.ln_f.bias.data[0] = math.nan
    [task, *_] = read_tasks(file, TOKENIZER, 64)
    with pytest.raises(RunError, match="log-probability is not finite"):
        score_choices(broken, task, CPU)


BAD = [
    ("not json", "is not JSON"),
    (line("a", "bc", 0), "needs the text"),
    (json.dumps({"prompt": "a", "choices": ["b", "c"]}), "answer None is not"),
    (line("a", ["b"], 0), "needs the text"),
    (line("a", ["b", "c"], True), "answer True"),
    (line("a", ["b", "c"], 2), "answer 2 is not from 0 to 1"),
    (line("a", ["b", " b "], 0), "an empty choice, or the same choice twice"),
    (line("a", ["b", "c"], 0, label="c"), "the unknown key 'label'"),
    (line("a", ["b", "word " * 40], 0), "the completion is longer than a block of 40"),
]


def test_a_bad_line_is_named(tmp_path):
    for bad, words in BAD:
        path = written(tmp_path / "bad.jsonl", line("a", ["b", "c"], 0), bad)
        reason = refusal(f"{path}, line 2", read_tasks, path, TOKENIZER, 40)
        assert words in reason, bad[:80]


def test_wrong_options_end_in_one_line(base, book, file, tmp_path):
    empty = written(tmp_path / "empty.jsonl")
    argv = ("--base", base, "--block-size", 40)
    for options, words in (
        (("--choices", empty), f"{empty}: 0 questions"),
        (("--choices", file, "--text", book), "not allowed with"),
        (("--choices", file, "--stride", 4), "--label-shift are for texts"),
    ):
        assert words in one_line(run(evaluate.main, *argv, *options), 2)
    bad = written(tmp_path / "bad.jsonl", line("a", ["b", "c"], 2))
    words = runs.arguments("lora", base, bad, tmp_path / "out")
    assert f"{bad}, line 1: answer 2" in one_line(run(train.main, *words), 2)
