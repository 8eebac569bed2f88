"""The GPU memory table: the page shows the command's table, with the model's true sizes.

tests/model/fake_cuda.py compares the bytes per block with the bytes that autograd keeps.
"""

import pytest
import torch

from benchmarks import gpu_memory
from benchmarks.gpu_memory import BASES, CASES, parameters
from model.gpt2 import GPT2
from tests.runs import stdout_of, table
from training.options import ROOT


def test_the_page_has_the_commands_table():
    printed = table(stdout_of(gpu_memory.main))
    page = (ROOT / "docs" / "scaling.md").read_text()
    on_page = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in on_page]
    assert len(printed) == 2 + len(CASES)
    for row in (printed[0], *printed[2:]):
        assert row in cells


@pytest.mark.parametrize("name", BASES)
def test_parameters_are_counted_as_the_model_has_them(name):
    with torch.device("meta"):
        model = GPT2(BASES[name])
    assert parameters(BASES[name]) == sum(p.numel() for p in model.parameters())
