"""Make the notebook from its script, and run it: `python -m lesson.notebook.make`.

In lora_from_scratch.py a code cell begins at `# %%`, and a text cell at `# %% [markdown]`. Lines of
text begin with `# `. The notebook stores the cells' output and figures, to be read without a run.
"""

import base64
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

SCRIPT = Path(__file__).with_name("lora_from_scratch.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

Cell = dict[str, Any]


def cell(part: str) -> Cell:
    """Return a cell from `part`, the text of the script after `# %%`. Code has no outputs yet."""
    head, _, body = part.partition("\n")
    lines = body.strip("\n").splitlines(keepends=True)
    if head == " [markdown]":
        text = [line.removeprefix("#").removeprefix(" ") for line in lines]
        return {"cell_type": "markdown", "metadata": {}, "source": text}
    code = {"cell_type": "code", "metadata": {}, "source": lines}
    return code | {"execution_count": None, "outputs": []}


def cells(script: str) -> list[Cell]:
    """Return the script's cells."""
    return [cell(part) for part in script.split("# %%")[1:]]


def run(cells: list[Cell]) -> dict[str, Any]:
    """Run the code cells in order and store their outputs. Return the names that they define."""
    names: dict[str, Any] = {}
    code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, code_cell in enumerate(code_cells, 1):
        code_cell["execution_count"] = number
        code_cell["outputs"] = outputs_of("".join(code_cell["source"]), names)
    return names


def outputs_of(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell. Return its text, and then each figure that `plt.show()` shows, as in Jupyter."""
    from matplotlib import pyplot as plt  # slow to import

    printed = io.StringIO()
    outputs: list[dict[str, Any]] = []

    def show() -> None:
        png = io.BytesIO()
        plt.savefig(png, format="png", dpi=100, bbox_inches="tight")
        plt.close()
        image = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n"}
        outputs.append({"output_type": "display_data", "data": image, "metadata": {}})

    with redirect_stdout(printed), patch.object(plt, "show", show):
        exec(source, names)
    text = printed.getvalue().splitlines(keepends=True)
    if text:
        outputs.insert(0, {"name": "stdout", "output_type": "stream", "text": text})
    return outputs


def main() -> None:
    made = cells(SCRIPT.read_text())
    run(made)
    about = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook = {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 4}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"saved {NOTEBOOK}")


if __name__ == "__main__":
    main()
