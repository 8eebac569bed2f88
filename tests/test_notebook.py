"""The notebook is its script, runs from top to bottom, and shows what it says."""

import json

import torch

from lesson.notebook.make import NOTEBOOK, SCRIPT, notebook


def test_the_notebook_is_what_the_script_gives():
    assert NOTEBOOK.read_text() == notebook(SCRIPT.read_text()), (
        "run python -m lesson.notebook.make"
    )


def test_the_notebook_shows_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)  # where Jupyter runs it
    found = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), found)
    assert found["count"] == 49_152
    said = capsys.readouterr().out
    assert "a new adapter changes no logit: True" in said
    texts = [said.partition(name)[2].partition("\n")[0] for name in ("base:   ", "adapted:")]
    assert all("You climb the stair and " in text for text in texts) and texts[0] != texts[1]
    assert found["first_gradients"]["A"] == 0 < found["first_gradients"]["B"]
    assert found["after"] < 0.9 * found["before"]
    assert found["spectrum"][7] > 1e-3 * found["spectrum"][0] > found["spectrum"][8]
    torch.testing.assert_close(found["merged_logits"], found["adapted_logits"], atol=1e-3, rtol=0)
    assert (found["adapted_logits"] - found["base_logits"]).abs().max() > 0.1
    assert found["peft_difference"] < 1e-3
