"""The notebook equals its script, and a short run of it says what the texts claim."""

import json
import sys

import pytest
import torch

from lesson.notebook.make import NOTEBOOK, SCRIPT, cells, run

STORED = json.loads(NOTEBOOK.read_text())["cells"]


@pytest.fixture(scope="module")
def fresh():
    """Run the script with a fifth of its steps on a quarter of the tokens. Return its cells, and
    the names that it defined.
    """
    short = SCRIPT.read_text()
    for whole, small in (
        ("STEPS = 60", "STEPS = 12"),
        ("block_size=128, stride=128", "block_size=32, stride=32"),
        ("tokenizer).ids, 0.1)", "tokenizer).ids, 0.02)"),
    ):
        assert whole in short
        short = short.replace(whole, small)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOK.parent)  # Jupyter's working directory
        patch.setattr(sys, "path", list(sys.path))
        made = cells(short)
        return made, run(made)


def test_the_notebook_is_what_the_script_gives():
    def sources(notebook_cells):
        return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook_cells]

    assert sources(STORED) == sources(cells(SCRIPT.read_text())), (
        "run python -m lesson.notebook.make"
    )
    assert NOTEBOOK.stat().st_size < 600_000


def test_the_three_starts(fresh):
    """Both zero never moves. Both random begins above the base. A random, B zero begins at it."""
    _, names = fresh
    base = names["base_losses"]
    assert names["zero_losses"] == base
    assert all(not gradient.any() for gradient in names["gradients"])
    assert names["random_losses"][0] > base[0] + 0.5
    assert names["lora_losses"][0] == base[0]
    assert names["lora_losses"][1] < base[1]


def test_what_it_writes_its_rank_merging_and_peft(fresh):
    _, names = fresh
    for text in (names["before_text"], names["after_text"]):
        assert text.startswith("You climb the stair and ")
    assert names["before_text"] != names["after_text"]

    assert names["learned"][7] > 1e-3 * names["learned"][0] > names["learned"][8]  # of rank 8
    torch.testing.assert_close(names["merged_logits"], names["adapted_logits"], atol=1e-3, rtol=0)
    assert (names["adapted_logits"] - names["base_logits"]).abs().max() > 0.1
    assert names["our_difference"] < 1e-3
    assert names["peft_difference"] < 1e-3
