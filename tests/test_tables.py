"""Find each number of each table on the pages in a stored file, without lesson/.

A table is named `page#heading`, or `page#heading/2` if it is the second below its heading. It is
MEASURED, COUNTED or FACTS. The numbers in a row of a measured table must occur in one list of
stored numbers (`table_rows.py`), in the same order, rounded to the digits that the page prints.
"""

import json
import re
from pathlib import Path

import pytest

from tests import table_rows as rows_of
from tests.table_rows import FIGURES, RESULTS, numbers

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STORED = sorted([*FIGURES.glob("*.json"), *RESULTS.glob("*.json")])
# Columns with settings and counts, which no file stores
SETTINGS = """LoRA | run | run, rate | setting | choose | text | text (tokens, passes) | trained
| trained numbers | trained parameters | parameters trained | batch size, steps | what differs
| numbers | variant | added options | $s$ | move on mini, by formula
| move on GPT-2's shapes, by formula"""
MEASURED = {
    "README#What comes out": rows_of.methods,
    "experiments#The learning rate": rows_of.learning_rates,
    "experiments#The rank": rows_of.ranks,
    "experiments#The rate, by steps and passes": rows_of.rates,
    "experiments#The recipe": rows_of.frontier,
    "experiments#The recipe beside the reference": rows_of.recipes,
    "experiments#Dropout and weight decay": rows_of.regularisation,
    "experiments#The targets": rows_of.targets,
    "experiments#The variants": rows_of.variants,
    "experiments#Each method at its best rate": rows_of.methods,
    "findings#LoRA's best rate is ten times full fine-tuning's": rows_of.rate_ratios,
    "findings#Large batches hurt LoRA more": rows_of.gaps_by_batch,
    "findings#Low ranks run out of capacity": rows_of.gaps_by_share,
    "findings#LoRA has intruder dimensions": rows_of.intruders,
    "findings#On SmolLM2": rows_of.smollm2,
    "lora#Rank, alpha and the learning rate": rows_of.choices,
    "lora-in-depth#Initialisation": rows_of.initialisation,
    "lora-in-depth#A first step of AdamW": rows_of.first_step,
    "qlora#A step": rows_of.quantised_memory,
    "qlora#A step/2": rows_of.quantised,
    "real-weights#What comes out": rows_of.other_model,
    "reference-run#The reference run, and why its perplexities are so low": rows_of.reference_runs,
    "speed#One race": rows_of.race,
    "training#Where the bytes go": rows_of.bytes_counted,
}
# Numbers that follow from formulas or from the code, or that another test compares
COUNTED = {
    "curves#The key": "tests/test_curves.py compares it with the stored runs",
    "lora#The layer": "sizes of matrices",
    "qlora#A model of your own": "bytes of a model, by formula",
    "solutions#12. The rank where LoRA meets full fine-tuning": "the exercise prints it",
    "solutions#13. What an outlier costs": "tests/test_exercises.py computes it",
    "training#Where the bytes go/2": "vectors per token",
    "training#Where the bytes go/3": "the same count for gpt2-xl",
}
# Tables without measured numbers
FACTS = {
    "README#Read it": "files",
    "commands#Errors and their remedies": "messages",
    "commands#What a run writes": "files",
    "findings#Findings": "a summary of the page's other tables",
    "howto#Which rank, alpha and rate?": "the rule in training/recipe.py",
    "measures#Where to find them": "fields of files",
    "real-weights#Which layers": "names of layers",
    "reliability#What is promised, and how it is kept": "promises",
    "scaling#On a GPU": "commands",
    "training#Mixed precision": "reasons for precisions",
    "variants#Variants of LoRA": "the factors of the rate in training/recipe.py",
    "variants#What goes together": "options",
}


def tables(page):
    """Return the rows of cells of each table on a page, the header included."""
    found = {}
    heading, count, before = "", 0, ""
    for line in re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text()).splitlines():
        if line.startswith("#"):
            heading, count = line.lstrip("# "), 0
        if line.startswith("|"):
            count += not before.startswith("|")
            key = f"{page.stem}#{heading}" + (f"/{count}" if count > 1 else "")
            found.setdefault(key, []).append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return found


TABLES = {key: rows for page in PAGES for key, rows in tables(page).items()}


def is_printed(number, value):
    """Return whether the value, rounded to the number's digits, is the number."""
    digits, _, exponent = number.partition("e")
    places = len(digits.partition(".")[2])
    return float(f"{value:.{places}{'e' if exponent else 'f'}}") == float(number)


def not_found(row, values):
    """Return the numbers of a row that are not among the values in this order, and the nearest."""
    wrong = []
    for number in row:
        places = [i for i, value in enumerate(values) if is_printed(number, value)]
        if places:
            values = values[places[0] + 1 :]
        else:
            wrong.append((number, min(values, key=lambda x: abs(x - float(number)), default=None)))
    return wrong


def wrong_rows(key):
    header, _, *rows = TABLES[key]
    settings = re.split(r"\s\| ", SETTINGS)
    columns = [i for i, title in enumerate(header) if title.replace("`", "") not in settings]
    lists = MEASURED[key]()
    if not isinstance(lists, dict):
        lists = dict(enumerate(lists))
    for row in rows:
        found = [number for i in columns for number in numbers(row[i])]
        label = row[0].replace("`", "")
        candidates = [lists[label]] if label in lists else lists.values()
        for number, nearest in min((not_found(found, values) for values in candidates), key=len):
            yield f"{key}, row {' | '.join(row)}: {number} is not stored. The nearest is {nearest}"


@pytest.mark.parametrize("key", sorted(MEASURED))
def test_each_number_is_stored(key):
    assert [*wrong_rows(key)] == []


def test_each_table_is_in_a_list():
    assert TABLES.keys() - {*MEASURED, *COUNTED, *FACTS} == set()


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_each_stored_file_has_its_command_date_and_machine(path):
    about = json.loads(path.read_text())
    assert about["command"].startswith(("make ", "python "))
    assert re.match(r"20\d\d-\d\d-\d\d", about["date"])
    assert re.match(r"\d+ cores, \S+", about["machine"])
