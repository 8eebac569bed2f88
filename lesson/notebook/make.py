"""Make the notebook from its script, lora_from_scratch.py: `python -m lesson.notebook.make`.

A cell begins at `# %%`; at `# %% [markdown]` a text, whose lines begin with `# `.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from common.cli import Parser
from common.errors import run_command

SCRIPT = Path(__file__).with_name("lora_from_scratch.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cell(part: str) -> dict[str, object]:
    """Return the cell whose script, after its `# %%`, is `part`."""
    head, _, body = part.partition("\n")
    body = body.strip("\n")
    if head == " [markdown]":
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        return {
            "cell_type": "markdown",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
    return {
        "cell_type": "code",
        "metadata": {},
        "source": body.splitlines(keepends=True),
        "execution_count": None,
        "outputs": [],
    }


def notebook(script: str) -> str:
    """Return the script as a notebook file, nbformat 4.4, without outputs."""
    stored = {
        "cells": [cell(part) for part in script.split("# %%")[1:]],
        "metadata": {"kernelspec": KERNEL},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(stored, indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    Parser(prog="lesson.notebook.make", description=__doc__).parse_args(argv)
    NOTEBOOK.write_text(notebook(SCRIPT.read_text()))


if __name__ == "__main__":
    run_command(main)
