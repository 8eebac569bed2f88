"""The experiment on the rates of `make example`, with a tiny random Llama in place of SmolLM2."""

import json

import pytest

from data.instructions import CHAT_TEMPLATE
from lesson.experiments import other_model, sweep
from tests.helpers import write_small_tokenizer
from tests.models import small_llama


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "CELLS", tmp_path / "known" / "cells.jsonl")


def test_a_short_version_trains_on_both_tasks_and_in_four_bits(tmp_path, monkeypatch):
    model = tmp_path / "model"
    small_llama().save_pretrained(model)
    write_small_tokenizer(model, 317)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    monkeypatch.setattr(other_model, "MODEL", str(model))
    monkeypatch.setattr(other_model, "apart", other_model.finetune)
    other_model.main(["--short", "--out", str(tmp_path)])

    data = json.loads((tmp_path / "other_model.json").read_text())["results"]
    [(rate, [book])], [(_, [talk])], [(_, [nf4])] = (runs.items() for runs in data.values())
    assert float(rate) == book["lr"] == nf4["lr"]
    assert len(book["base's samples"]) == len(talk["samples"]) == 3
    assert book["samples"] != book["base's samples"] and "samples" not in nf4
    for result in (book, talk, nf4):
        assert result["trained"][-1] < result["base"]
        assert result["peak_mb"] > 100
    assert book["in PEFT"] == pytest.approx(book["trained"][0], rel=1e-4)
    assert nf4["base"] != book["base"] and nf4["in PEFT"] != nf4["trained"][0]


def test_every_rate_has_a_run_and_the_best_rate_has_every_seed(monkeypatch):
    ran = []

    def fake(words, sampled):
        ran.append([*words, sampled])
        given = dict(zip(words[::2], words[1::2], strict=True))
        lr = float(given.get("--lr", 4e-3))
        return {"lr": lr, "trained": [90.0, 40 + abs(lr - 2e-3) * 1e3 + int(given["--seed"])]}

    monkeypatch.setattr(other_model, "apart", fake)
    found = other_model.rates("conversations", range(3), short=False)
    scores = {lr: list(map(other_model.score, runs)) for lr, runs in found.items()}
    assert scores == {0.002: [40, 41, 42], 0.004: [42], 0.008: [46]}
    data = ["--data", "data/instructions.jsonl"]
    assert ran[:2] == [
        [*data, "--seed", "0", True],
        [*data, "--lr", "0.002", "--seed", "0", False],
    ]
    other_model.rates("conversations", range(3), short=False)
    assert len(ran) == 5


def test_a_run_of_its_own_process_returns_its_result(monkeypatch):
    monkeypatch.setattr(other_model, "finetune", len)
    with pytest.raises(TypeError, match="takes exactly one argument"):
        other_model.apart(["--lr"], False)
