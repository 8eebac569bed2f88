"""The rates of `make example`, with a tiny Llama in place of SmolLM2, and quantised memory."""

import json

import pytest

from data.instructions import CHAT_TEMPLATE
from lesson.experiments import other_model, quantised_memory, sweep
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
    monkeypatch.setattr(other_model, "apart", lambda function, *arguments: function(*arguments))
    other_model.main(["--short", "--out", str(tmp_path)])

    data = json.loads((tmp_path / "other_model.json").read_text())["results"]
    talks, books, quantised = (runs.items() for runs in data.values())
    [(_, [talk])], [(rate, [book])], [(_, [nf4])] = talks, books, quantised
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

    def fake(function, words, sampled):
        ran.append([*words, sampled])
        given = dict(zip(words[::2], words[1::2], strict=True))
        lr = float(given.get("--lr", 4e-3))
        return {"lr": lr, "trained": [90.0, 40 + abs(lr - 2e-3) * 1e3 + int(given["--seed"])]}

    monkeypatch.setattr(other_model, "apart", fake)
    found = other_model.rates("conversations", range(3), short=False)
    scores = {lr: list(map(other_model.score, runs)) for lr, runs in found.items()}
    assert scores == {0.001: [41], 0.002: [40, 41, 42], 0.004: [42], 0.008: [46]}
    data = ["--data", "data/instructions.jsonl"]
    assert ran[:2] == [
        [*data, "--seed", "0", True],
        [*data, "--lr", "0.002", "--seed", "0", False],
    ]
    other_model.rates("conversations", range(3), short=False)
    assert len(ran) == 6


def test_a_new_process_returns_its_result_and_its_error():
    assert quantised_memory.apart(len, "four") == 4
    with pytest.raises(TypeError, match="takes exactly one argument"):
        quantised_memory.apart(len)


def test_every_format_of_the_base_has_a_peak_and_times(tmp_path, monkeypatch):
    kept = {name: quantised_memory.RUNS[name] for name in ("bf16", "nf4, checkpointing")}
    monkeypatch.setattr(quantised_memory, "RUNS", kept)
    monkeypatch.setattr(quantised_memory, "apart", lambda function, *rest: function(*rest))
    quantised_memory.main(["--short", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "quantised_memory.json").read_text())
    assert data["command"].startswith("python -m lesson.experiments.quantised_memory --short")
    assert list(data["results"]) == list(kept)
    for run in data["results"].values():
        assert len(run["seconds"]) == 2 and min(run["seconds"]) > 0
        assert run["peak_mb"] > 100
