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
    said = capsys.readouterr().out

    assert found["count"] == 49_152
    assert "a new adapter changes no logit: True" in said
    base = rest_of_line(said, "base:   ")
    adapted = rest_of_line(said, "adapted:")
    assert "You climb the stair and " in base
    assert "You climb the stair and " in adapted
    assert base != adapted

    assert found["first_gradients"]["A"] == 0 < found["first_gradients"]["B"]
    assert found["after"] < 0.9 * found["before"]
    spectrum = found["spectrum"]
    assert spectrum[7] > 1e-3 * spectrum[0] > spectrum[8]  # of rank 8
    torch.testing.assert_close(found["merged_logits"], found["adapted_logits"], atol=1e-3, rtol=0)
    assert (found["adapted_logits"] - found["base_logits"]).abs().max() > 0.1
    assert found["peft_difference"] < 1e-3


def rest_of_line(text, start):
    _, _, rest = text.partition(start)
    return rest.partition("\n")[0]
