"""The measured tables of the pages are as stored."""

import json
import re

import pytest

from lesson.tables.__main__ import MARKED, PAGES, main
from lesson.tables.stored import ROOT, TABLES

STORED = sorted([*ROOT.glob("docs/figures/*.json"), *ROOT.glob("benchmarks/results/*.json")])
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
# How often a page has a table without measured numbers: facts, formulas, files and options
UNMEASURED = {
    "README": 1,
    "commands": 2,
    "curves": 1,  # tests/test_curves.py compares it
    "findings": 1,
    "lora": 2,
    "measures": 1,
    "qlora": 1,
    "real-weights": 1,
    "speed": 1,  # two kernels, measured in one run
    "training": 2,
    "variants": 2,
}


def test_the_pages_have_the_stored_numbers():
    main(["--check"])


def test_each_table_is_marked_or_has_no_measured_number():
    texts = {page.stem: page.read_text() for page in PAGES}
    names = [mark[2] for text in texts.values() for mark in MARKED.finditer(text)]
    assert sorted(names) == sorted(TABLES)
    unmarked = {stem: len(TABLE.findall(MARKED.sub("", text))) for stem, text in texts.items()}
    assert {stem: count for stem, count in unmarked.items() if count} == UNMEASURED


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_each_stored_file_has_its_command_date_and_machine(path):
    about = json.loads(path.read_text())
    assert about["command"].startswith(("make ", "python "))
    assert re.match(r"20\d\d-\d\d-\d\d", about["date"])
    assert re.match(r"\d+ cores, \S+", about["machine"])
