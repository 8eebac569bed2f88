"""Make the notebook from its script, and run it: `python -m lesson.notebook.make`.

In lora_from_scratch.py a code cell begins at `# %%`, and a text cell at `# %% [markdown]`. Lines of
text begin with `# `. The notebook stores the cells' output and figures, to be read without a run.
"""

import base64
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common.cli import Parser
from common.errors import run_command
from common.files import atomic_path

SCRIPT = Path(__file__).with_name("lora_from_scratch.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

Cell = dict[str, Any]


def cell(part: str) -> Cell:
    """Return a cell from `part`, the text of the script after `# %%`. Code has no outputs yet."""
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


def cells(script: str) -> list[Cell]:
    """Return the script's cells."""
    return [cell(part) for part in script.split("# %%")[1:]]


def run(cells: Sequence[Cell]) -> dict[str, Any]:
    """Run the code cells in order and store their outputs. Return the names that they define."""
    names: dict[str, Any] = {}
    code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, code_cell in enumerate(code_cells, 1):
        code_cell["execution_count"] = number
        code_cell["outputs"] = outputs_of("".join(code_cell["source"]), names)
    return names


def outputs_of(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell's code. Return the printed text and the figures, as Jupyter shows them.

    `plt.show()` shows a figure, and a cell prints nothing after its figure.
    """
    from matplotlib import pyplot as plt  # slow to import

    printed = io.StringIO()
    figures: list[dict[str, Any]] = []

    def show() -> None:
        figures.append(figure_output(plt.gcf()))
        plt.close()

    with redirect_stdout(printed), patch.object(plt, "show", show):
        exec(source, names)
    text = printed.getvalue().splitlines(keepends=True)
    streams = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    return streams + figures


def figure_output(figure: Any) -> dict[str, Any]:
    """Return a figure as a PNG output of a cell."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100, bbox_inches="tight")
    return {
        "output_type": "display_data",
        "data": {"image/png": base64.b64encode(png.getvalue()).decode() + "\n"},
        "metadata": {},
    }


def notebook(cells: Sequence[Cell]) -> str:
    """Return cells as a notebook file, nbformat 4.4."""
    stored = {
        "cells": cells,
        "metadata": {"kernelspec": KERNEL, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(stored, indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    Parser(prog="lesson.notebook.make", description=__doc__).parse_args(argv)
    made = cells(SCRIPT.read_text())
    run(made)
    with atomic_path(NOTEBOOK) as temporary:
        temporary.write_text(notebook(made))
    print(f"saved {NOTEBOOK}")


if __name__ == "__main__":
    run_command(main)
