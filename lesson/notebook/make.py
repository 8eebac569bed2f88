"""Make the notebook from its script, lora_from_scratch.py: `python -m lesson.notebook.make`.

A cell begins at `# %%`; at `# %% [markdown]` a text, whose lines begin with `# `.
"""

import json
from pathlib import Path

SCRIPT = Path(__file__).with_name("lora_from_scratch.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def cells(script: str) -> list[tuple[str, str]]:
    """Return each cell's kind, code or markdown, and its source."""
    result = []
    for part in script.split("# %%")[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if head == " [markdown]":
            result.append(("markdown", "\n".join(line[2:] for line in body.split("\n"))))
        else:
            result.append(("code", body))
    return result


def notebook(script: str) -> str:
    """Return the script as a notebook file, nbformat 4.4, without outputs."""
    code = {"execution_count": None, "outputs": []}
    return (
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": kind,
                        "metadata": {},
                        "source": source.splitlines(keepends=True),
                        **(code if kind == "code" else {}),
                    }
                    for kind, source in cells(script)
                ],
                "metadata": {
                    "kernelspec": {
                        "display_name": "Python 3",
                        "language": "python",
                        "name": "python3",
                    }
                },
                "nbformat": 4,
                "nbformat_minor": 4,
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(SCRIPT.read_text()))
