"""Write the measured tables of the pages from stored results: `python -m lesson.tables [--check]`

A comment such as `<!-- table: ranks -->` above a table names the function that yields its lines.
With --check, they are only compared.
"""

import re
from collections.abc import Sequence
from difflib import unified_diff

from common.cli import Parser
from common.errors import RunError, run_command
from lesson.tables import experiments, findings, others
from lesson.tables.stored import ROOT, TABLES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"^(<!-- table: (\w+) -->\n)(?:\|.*\n)*", re.MULTILINE)
MODULES = (experiments, findings, others)  # importing a module registers its tables


def written(text: str) -> str:
    """Return the text of a page, with each marked table as it is stored."""

    def lines(mark: re.Match[str]) -> str:
        return mark[1] + "".join(f"{line}\n" for line in TABLES[mark[2]]())

    return MARKED.sub(lines, text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="lesson.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    found: list[str] = []
    for page in PAGES:
        old = page.read_text()
        new = written(old)
        if args.check:
            names = (str(page.relative_to(ROOT)), "stored")
            found += unified_diff(old.splitlines(), new.splitlines(), *names, n=0, lineterm="")
        else:
            page.write_text(new)
    if found:
        raise RunError("\n".join(found))


if __name__ == "__main__":
    run_command(main)
