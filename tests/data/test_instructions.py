"""Instructions: rows, masks, refusals, and a step's loss and gradients against stock libraries."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evaluate
import train
from benchmarks.ours import Steps
from data.instructions import read_examples
from lora.save import save_adapter
from model.gpt2 import IGNORE_INDEX
from tests import runs
from tests.helpers import TINY, refusal, relative_difference, small_tokenizer
from tests.pairs import adapted
from tests.runs import one_line, run, stock_model

TOKENIZER = small_tokenizer(TINY["vocab_size"])
END = TOKENIZER.end_of_text
LENGTH = 40  # the block size: the longest example below is cut
PAIRS = [
    ("Who lights it?", "You."),
    ("And then?", "Nobody. The gull does, in fact."),
    ("A long question, that no block of forty tokens will hold whole?", "It is so."),
    ("Why?", "…"),
    ("  Is it\n spelled so? ", " Yes. "),
    ("", "An answer to nothing."),
    ("Seven?", "Seven."),
]


def example(prompt: str, completion: str) -> str:
    return json.dumps({"prompt": prompt, "completion": completion})


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def write(path, *lines: str | bytes):
    """Write these lines. Return the path. Bytes are written unchanged, without a new line."""
    with open(path, "wb") as file:
        for line in lines:
            file.write(f"{line}\n".encode() if isinstance(line, str) else line)
    return path


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text).astype(int).tolist()


def labelled(prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Return an example's ids and labels. Label t belongs to id t, as in transformers."""
    before = encoded(f"User: {prompt.strip()}\nAssistant:")
    after = [*encoded(f" {completion.strip()}"), END]
    ids = before + after
    labels = [IGNORE_INDEX] * len(before) + after
    return ids[-LENGTH - 1 :], labels[-LENGTH - 1 :]


def stock_batch(pairs) -> dict[str, Tensor]:
    """Return transformers' inputs and labels for these examples, padded on the right."""
    rows = [labelled(*pair) for pair in pairs]
    longest = max(len(ids) for ids, _ in rows)

    def pad(lists, value):
        return torch.tensor([x + [value] * (longest - len(x)) for x in lists])

    return {
        "input_ids": pad([ids for ids, _ in rows], END),
        "labels": pad([labels for _, labels in rows], IGNORE_INDEX),
        "attention_mask": pad([[1] * len(ids) for ids, _ in rows], 0),
    }


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", *(example(*pair) for pair in PAIRS))


def stepped(trainer: Steps) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a step on all examples except the last, and the gradients."""
    trainer.trainer.optimizer.zero_grad = lambda: None  # keeps the gradients
    batch = trainer.plan.batch(np.arange(len(PAIRS) - 1), trainer.data.training)
    loss = trainer.step(batch).item() / batch.num_tokens
    return loss, {name: p.grad for name, p in trainer.parameters.items()}


def stock_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients with our names and shapes."""
    gradients = {}
    for name, parameter in model.named_parameters():
        for theirs in ("base_model.model.", "transformer.", ".default"):
            name = name.replace(theirs, "")
        if parameter.requires_grad:
            conv1d = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))  # (in, out)
            gradients[name] = parameter.grad.t() if conv1d else parameter.grad
    return gradients


@pytest.mark.parametrize("method, parts", [("lora", 3), ("full", 1)])
def test_a_steps_loss_and_gradients_are_those_of_stock_libraries_with_labels(
    base, data, tmp_path, method, parts, capsys
):
    adapter = tmp_path / "adapter"
    save_adapter(adapted(base, ("c_attn", "c_fc"), r=4, lora_dropout=0.0), adapter, "gpt2")
    argv = [method, base, data, tmp_path / "out", "--block-size", LENGTH, "--grad-accum", parts]
    argv += ["--clip", 0, "--val-fraction", 0.15, "--base-dropout", 0]
    if method == "lora":
        argv += ["--init-adapter", adapter]
    plain = stepped(runs.trainer(*argv, "--kernels", "plain"))
    fast = stepped(runs.trainer(*argv))
    with runs.cudas_loss():
        cuda = stepped(runs.trainer(*argv))
    assert "2 of 7 examples are longer than a block of 40" in capsys.readouterr().out
    model = stock_model(base, adapter if method == "lora" else None)
    wanted = model(**stock_batch(PAIRS[:-1])).loss
    wanted.backward()
    theirs = stock_gradients(model)
    # The fast operations add in another order. Stock fp32 gradients differ as much from fp64.
    for (loss, gradients), tolerance in ((plain, 1e-6), (fast, 2e-6), (cuda, 2e-6)):
        assert loss == pytest.approx(wanted.item(), rel=1e-6)
        assert gradients.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert relative_difference(gradients[name], gradient) < tolerance, name
    unmasked = stock_batch(PAIRS[:-1])
    unmasked["labels"] = unmasked["input_ids"]
    assert abs(model(**unmasked).loss.item() - loss) > 1e-3


BAD = [
    ('{"a":' * 3000, "is not JSON"),
    ("[", "is a JSON array; write each example as a line of its own"),
    ('{"prompt": "a", "prompt": "b", "completion": "c"}', "has the key 'prompt' twice"),
    (example("a", "b" * 10_000_000), "is not JSON in UTF-8 of at most 65,536 bytes"),
    (example("a", "\ud800"), "surrogates not allowed"),
    ('{"prompt": "a"}', "needs the texts"),
    (json.dumps({"messages": [turn("tool", "a"), turn("assistant", "b")]}), "needs the texts"),
    (json.dumps({"messages": [turn("assistant", "b") | {"weight": 0}]}), "unknown key 'weight'"),
    ('{"prompt": "a", "completion": "b", "system": "c"}', "has the unknown key 'system'"),
    (example("a", " \n"), "an empty completion"),
    (json.dumps({"messages": [turn("assistant", "b"), turn("user", "a")]}), "no completion at"),
    (example("a", "word " * 40), "the completion is longer than a block of 40; shorten"),
]


def test_a_bad_line_is_named(tmp_path):
    for line, words in BAD:
        path = write(tmp_path / "bad.jsonl", example("a", "b"), line, example("a", "b"))
        reason = refusal(f"{path}, line 2", read_examples, path, TOKENIZER, LENGTH)
        assert words in reason, line[:80]


def test_a_completion_as_long_as_a_block_is_taken_whole(tmp_path):
    completion = "x" * (LENGTH - len(encoded(" ")))
    ids = [*encoded(f" {completion}"), END]
    path = write(tmp_path / "x.jsonl", example("Long?", completion[: LENGTH - len(ids)]))
    ((inputs, targets, _),) = read_examples(path, TOKENIZER, LENGTH)
    assert len(inputs) == LENGTH and (targets != IGNORE_INDEX).all() and targets[-1] == END

    path = write(tmp_path / "x.jsonl", example(*PAIRS[0]))
    [row] = read_examples(path, TOKENIZER, 999)
    [same] = read_examples(path, TOKENIZER, row.shape[1])
    assert np.array_equal(same, row)


def test_the_commands_validate_on_the_last_examples_or_on_a_file_of_their_own(base, data, tmp_path):
    lines = [example(*pair) for pair in PAIRS[1::2]]
    others = write(tmp_path / "val.jsonl", b"\xef\xbb\xbf", lines[0], "", *lines[1:])

    def losses(pairs) -> float:
        return stock_model(base)(**stock_batch(pairs)).loss.item()

    for option, value, pairs in (
        ("--val-fraction", 0.5, PAIRS[-3:]),
        ("--val-data", others, PAIRS[1::2]),
    ):
        options = ("--block-size", LENGTH, "--max-steps", 1, option, value)
        done = runs.trained("lora", base, data, tmp_path / option, *options)
        assert done.report["base_val_loss"] == pytest.approx(losses(pairs), rel=1e-6)
        assert done.report["options"]["book"] == []
        assert done.report["options"]["data"] == data.name
    argv = ("--base", base, "--data", data, "--block-size", LENGTH)
    scores, _ = runs.scores(tmp_path / "scores.json", *argv)
    assert scores["loss"] == pytest.approx(losses(PAIRS), rel=1e-6)
    assert scores["tokens"] == sum(len(encoded(f" {c.strip()}")) + 1 for _, c in PAIRS)
    assert scores["bytes"] == sum(len(f" {c.strip()}".encode()) for _, c in PAIRS)


def test_too_few_examples_and_options_for_books_are_refused(base, book, data, tmp_path):
    too_few = "7 examples to train on and 0 to validate on"
    alone = "--val-data: needs --data, and excludes --val-fraction"
    for source, options, words in (
        (data, ("--val-fraction", 0.1), too_few),
        (data, ("--book", book), "not allowed with"),
        (book, ("--val-data", data), alone),
        (data, ("--stride", 4), "--label-shift are for books"),
    ):
        argv = runs.arguments(
            "lora", base, source, tmp_path / "no", "--block-size", LENGTH, *options
        )
        assert words in one_line(run(train.main, *argv), 2)
    for options, words in (
        (("--val-fraction", 0.1), f"{data}: 0 examples; too short to score"),
        (("--stride", 4), "--label-shift are for texts"),
    ):
        argv = ("--base", base, "--data", data, "--block-size", LENGTH, *options)
        assert words in one_line(run(evaluate.main, *argv), 2)
