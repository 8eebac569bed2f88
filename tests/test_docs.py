"""The pages: links, files and commands exist, and quotes are exact. The toy bugs print the pages'
output.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "conformance").rglob("*.md")),
]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`([\w./-]*\w\.(?:py|md|toml)|Makefile)`")
MODULE = re.compile(r"python -m ([\w.]+)")
MADE = re.compile(r"(?:^|`)make ((?:[a-z][a-z-]*(?: |`|$))+)", re.MULTILINE)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ONE_PAGE = (ROOT / "one_page.py").read_text()
# A Python block is a quote if the paragraph before it links to the one page.
QUOTE = re.compile(r"one_page\.py\).*\n(?:.+\n)*\n```python\n((?:.*\n)*?)```")
# A name and a file, as in a diagram of calls, or as in "`Name` in `file.py`".
CALL = re.compile(r"([\w/]+\.py): ([\w.]+)")
SYMBOL = re.compile(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`")
TOY = re.compile(r"^```python\n(.*?)^```\n\n^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOYS = TOY.findall((ROOT / "docs" / "bugs.md").read_text())


@cache
def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that a code host gives the page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).strip()
        found.add(words.replace(" ", "-"))
    return found


def wrong_links(page: Path) -> list[str]:
    wrong = []
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page
        if path:
            target = (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def wrong_files(page: Path) -> list[str]:
    return [
        name
        for name in NAMED_FILE.findall(prose(page))
        if not (ROOT / name).exists() and not (page.parent / name).exists()
    ]


def wrong_symbols(page: Path) -> list[str]:
    """Return the functions, classes and constants that a page finds in a file without them."""
    text = page.read_text()
    named = CALL.findall(text) + [(file, name) for name, file in SYMBOL.findall(text)]
    return [f"{name} in {file}" for file, name in named if not defines(ROOT / file, name)]


def defines(file: Path, name: str) -> bool:
    """Return whether a file defines a name. `Class.method` needs both."""
    source = file.read_text()
    return all(
        re.search(rf"^ *(def |class )?{part}\b", source, re.MULTILINE) for part in name.split(".")
    )


def wrong_commands(page: Path) -> list[str]:
    """Return the wrong modules and make targets on a page, code blocks included."""
    text = page.read_text()
    modules = [f"python -m {name}" for name in MODULE.findall(text) if not is_module(name)]
    named = " ".join(MADE.findall(text)).replace("`", " ").split()
    return modules + [f"make {target}" for target in named if target not in TARGETS]


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package is missing
        return False


@pytest.mark.parametrize("check", [wrong_links, wrong_files, wrong_symbols, wrong_commands])
def test_what_the_pages_point_at_exists(check):
    wrong = {}
    for page in PAGES:
        found = check(page)
        if found:
            wrong[str(page.relative_to(ROOT))] = found
    assert wrong == {}


def is_quote(block: str) -> bool:
    """Return whether a block is a part of the one page, perhaps with less indentation."""
    return any(f"\n{indent(block, depth * ' ')}" in ONE_PAGE for depth in (0, 4, 8, 12))


def test_the_pages_quote_the_one_page():
    quotes = {str(page.relative_to(ROOT)): QUOTE.findall(page.read_text()) for page in PAGES}
    counts = {name: len(blocks) for name, blocks in quotes.items() if blocks}
    assert counts == {"README.md": 1, "docs/lora.md": 2, "docs/training.md": 3}
    assert [block for blocks in quotes.values() for block in blocks if not is_quote(block)] == []


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # from one of the bugs
@pytest.mark.parametrize(("block", "printed"), TOYS)
def test_a_toy_prints_what_the_page_says(block, printed, capsys):
    exec(block, {})
    assert capsys.readouterr().out == printed
    assert "wrong:" in printed
    assert "fixed:" in printed
