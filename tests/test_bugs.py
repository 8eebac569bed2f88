"""docs/bugs.md: each block prints what stands below it."""

import re

import pytest

from training.options import ROOT

TOYS = re.findall(r"^```python\n(.*?)^```\n\n^```text\n(.*?)^```",
                  (ROOT / "docs" / "bugs.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("block", "printed"), TOYS, ids=["labels", "orig_mod", "transpose"])
def test_a_toy_prints_what_the_page_says(block, printed, capsys):
    exec(block, {})
    assert capsys.readouterr().out == printed
    assert "wrong:" in printed and "fixed:" in printed
