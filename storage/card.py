"""Write README.md, the model card that the Hugging Face hub shows for a repository.

The metadata is YAML between two lines of dashes (https://huggingface.co/docs/hub/model-cards).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import atomic_path
from storage.hf_compat import stock_name
from storage.hub import split_revision

CARD = "README.md"
MARK = "# Replaced by the command that wrote it. Delete this line to keep what you write here."
CARD_TEXT = """\
---
{mark}
# license: yours to choose (https://huggingface.co/docs/hub/repositories-licenses)
{base_model}
library_name: {library}
pipeline_tag: text-generation
tags: [gpt2, {tag}]
---

# {name}

{text}

```python
{code}
```
"""
LOAD_ADAPTER = """\
import torch
import transformers
from peft import PeftModel

base = {base}  # if this is a directory, give its path on your machine
adapter = "OWNER/NAME"  # this repository, or the path of this directory
model = transformers.AutoModelForCausalLM.from_pretrained(
    base, revision="{revision}", dtype=torch.float32
)
model = PeftModel.from_pretrained(model, adapter)
tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)"""
LOAD_MODEL = """\
from transformers import pipeline

generator = pipeline("text-generation", "OWNER/NAME")  # or the path of this directory"""


def save_card(directory: Path, text: str) -> None:
    """Write the card, unless the directory contains a README.md that the user wrote."""
    path = directory / CARD
    if path.exists() and not is_ours(path):
        print(f"{path}: is not replaced, because you have written or edited it")
        return
    with atomic_path(path) as temporary:  # a file name in the text may not be UTF-8
        temporary.write_text(text, encoding="utf-8", errors="replace")


def is_ours(path: Path) -> bool:
    """Return whether this card still has the MARK line: a command of this project wrote the card,
    and the user has not deleted the line."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def run_card(name: str, report: Mapping[str, Any]) -> str:
    """Return the card of a run. `report` is the content of `run.json`."""
    options = report["options"]
    sources = ", ".join(Path(source).name for source in options["book"] or [options["data"]])
    tag = "lora" if report["method"] == "lora" else "full-fine-tuning"
    text = (
        f"{_base_name(report['base'], options.get('quantise'))}, trained on {sources} ({tag}). The "
        f"validation loss is {report['best_val_loss']:.4f} nats per token, and "
        f"{report['base_val_loss']:.4f} for the base. `run.json` has the options."
    )
    return _card(name, report["base"], tag, text)


def merge_card(name: str, base: str, quantise: str | None, adapter: bool, precision: str) -> str:
    """Return the card of a base in a precision, with or without a merged adapter."""
    done = "with a LoRA adapter merged into its weights" if adapter else f"saved in {precision}"
    return _card(name, base, "merge", f"{_base_name(base, quantise)} {done}.")


def _base_name(base: str, quantise: str | None) -> str:
    return f"{stock_name(base)} in {quantise.upper()}" if quantise else stock_name(base)


def _card(name: str, base: str, tag: str, text: str) -> str:
    """Fill the template. `tag` is the card's tag on the hub. An adapter has the tag "lora"."""
    repository, revision = split_revision(stock_name(base))
    base_model = f"base_model: {repository}"
    if repository.startswith("./"):
        base_model = "# base_model: OWNER/NAME, if you upload the base"
    library, code = "transformers", LOAD_MODEL
    if tag == "lora":
        library = "peft"
        code = LOAD_ADAPTER.format(base=json.dumps(repository), revision=revision or "main")
    return CARD_TEXT.format(
        mark=MARK, base_model=base_model, library=library, tag=tag, name=name, text=text, code=code
    )
