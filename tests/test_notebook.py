"""The notebook equals its script, and a short run of it says what the texts claim."""

import json
import sys

import pytest
import torch

from lesson.notebook.make import NOTEBOOK, SCRIPT, cells, run

STORED = json.loads(NOTEBOOK.read_text())["cells"]


@pytest.fixture(scope="module")
def names():
    """Run the script on fewer windows, and return the names that it defines."""
    short = SCRIPT.read_text()
    for whole, small in (("= 128, 2, 1, 4e-3", "= 512, 2, 1, 4e-3"), ("// 10", "// 50")):
        assert whole in short
        short = short.replace(whole, small)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOK.parent)  # Jupyter's working directory
        patch.setattr(sys, "path", list(sys.path))
        patch.delitem(sys.modules, "one_page", raising=False)  # the script changes its settings
        return run(cells(short))


def test_the_notebook_is_what_the_script_gives():
    def sources(notebook_cells):
        return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook_cells]

    assert sources(STORED) == sources(cells(SCRIPT.read_text())), (
        "run python -m lesson.notebook.make"
    )


def test_a_random_start_of_a_alone_changes_nothing_and_can_learn(names):
    assert names["starts_as_the_base"]
    of_a, of_b = names["first_gradients"]
    assert of_a == 0 < of_b
    assert names["new_perplexity"] == names["base_perplexity"]
    assert names["damaged_perplexity"] > 2 * names["base_perplexity"]


def test_the_rank_of_the_update_merging_and_peft(names):
    values = names["values"]
    assert values[7] > 1e-4 * values[0] > values[8]  # rank 8
    uncut, *_, whole = names["cut_perplexities"]
    assert uncut == pytest.approx(names["base_perplexity"])
    assert whole < uncut
    torch.testing.assert_close(names["merged_logits"], names["adapted_logits"], atol=1e-3, rtol=0)
    assert (names["adapted_logits"] - names["base_logits"]).abs().max() > 0.1
    assert names["peft_difference"] < 1e-3
