"""The page of `make explore` shows what the commands compute, and any text as text."""

import json
import re
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

import generate
from adapters.load import load_with_adapter
from lesson.explore import __main__ as explore
from lora import adapter_disabled, lora_layers
from lora.save import save_adapter
from tests.helpers import TINY
from tests.pairs import ALL_FOUR, adapted
from tests.runs import one_line, run, scores, stdout_of

MARKUP = "The </script> ends <b>bold</b> & “naïve”.\n"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def adapter(base, tmp_path, monkeypatch):
    """Return an adapter that was not made by a run, so the page reads the book of `DEFAULTS`."""
    (tmp_path / "book.txt").write_text(20 * MARKUP)
    monkeypatch.setitem(explore.DEFAULTS, "book", [tmp_path / "book.txt"])
    save_adapter(adapted(base, ALL_FOUR, r=3, lora_alpha=2), tmp_path / "adapter", "gpt2")
    return tmp_path / "adapter"


@pytest.fixture
def page(base, adapter, tmp_path):
    stdout_of(explore.main, adapter, "--base", base, "--out", tmp_path / "explore.html")
    return tmp_path / "explore.html"


def shown(page):
    """Return the page's data, as a browser finds them: a script ends at the first `</script`."""
    begin = '<script type="application/json" id="data">'
    [found] = re.findall(f"{begin}(.*?)</script", page.read_text())
    return json.loads(found)


def test_the_texts_and_perplexities_are_those_of_the_commands(base, adapter, page, tmp_path):
    data = shown(page)
    model = ("--base", base, "--device", "cpu", f"--prompt={data['prompt']}")
    for text, more in zip(data["texts"], ((), ("--adapter", adapter)), strict=True):
        said = stdout_of(generate.main, *model, "--max-new-tokens", 80, *more)
        assert said == f"{data['prompt']}{text}\n\n"
    (tmp_path / "text.txt").write_text("".join(token["text"] for token in data["tokens"]))
    asked = ("--base", base, "--text", tmp_path / "text.txt", "--block-size", TINY["n_positions"])
    before, _ = scores(tmp_path / "base.json", *asked)
    after, _ = scores(tmp_path / "new.json", *asked, "--adapter", adapter)
    expected = [before["perplexity"], after["perplexity"]]
    assert data["table"][-1]["perplexities"][0:3:2] == pytest.approx(expected, rel=1e-5)
    gains = [token["log_p"][1] - token["log_p"][0] for token in data["tokens"][1:]]
    assert sum(gains) / len(gains) == pytest.approx(before["loss"] - after["loss"], abs=1e-5)


@torch.no_grad()
def test_a_rank_is_the_nearest_matrix_of_that_rank(base, adapter, page):
    _, model, tokenizer = load_with_adapter(str(base), adapter)
    for layer in lora_layers(model).values():
        u, s, vh = torch.linalg.svd(layer.delta_weight())
        layer.base_layer.weight += 1.5 * (u[:, :2] * s[:2]) @ vh[:2]
    _, passage = explore.first_texts(adapter, tokenizer, model.config.n_positions)
    ids = torch.tensor(passage.tolist())
    with adapter_disabled(model):
        perplexity = F.cross_entropy(model(ids[None, :-1])[0], ids[1:]).exp().item()
    rows = {row["rank"]: row["perplexities"] for row in shown(page)["table"]}
    assert list(rows) == [1, 2, 3]
    assert rows[2][explore.STRENGTHS.index(1.5)] == pytest.approx(perplexity, rel=1e-4)


def test_markup_in_a_passage_is_text(page):
    text = "".join(token["text"] for token in shown(page)["tokens"])
    assert "</script> ends <b>bold</b> & “naïve”" in text
    assert page.read_text().count("</script") == explore.PAGE.read_text().count("</script")


@pytest.mark.skipif(not BROWSER, reason="needs chromium or google-chrome")
def test_a_browser_draws_the_page_from_the_file(page):
    options = ("--headless", "--no-sandbox", "--enable-logging=stderr", "--dump-dom")
    drawn = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, timeout=60)
    dom = drawn.stdout.decode()
    assert 'aria-selected="true"' in dom and "strength 1.5" in dom
    assert "<b>" not in dom
    assert b"CONSOLE" not in drawn.stderr


def test_what_has_no_adapter_to_vary_is_refused(base, runs, tmp_path):
    save_adapter(adapted(base, use_dora=True), tmp_path / "dora", "gpt2")
    for directory, reason in (
        (runs["full"].out, "is a whole model"),
        (tmp_path / "no", "no such directory"),
        (tmp_path / "dora", "is DoRA"),
    ):
        assert reason in one_line(run(explore.main, directory, "--base", base), 2)
