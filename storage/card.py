"""Write README.md, the model card by which the Hugging Face hub knows a directory.

Its metadata is YAML between two lines of dashes (https://huggingface.co/docs/hub/model-cards). A
text in it is written as JSON, which YAML includes.
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
LICENCE = "# license: yours to choose (https://huggingface.co/docs/hub/repositories-licenses)"
LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

name = "OWNER/NAME"  # of this repository, or this directory
model = AutoPeftModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)"""
LOAD_MODEL = """\
from transformers import pipeline

generator = pipeline("text-generation", "OWNER/NAME")  # of this repository, or this directory"""


def save_card(directory: Path, text: str) -> None:
    """Write the card, unless a README.md is there that is the user's own."""
    path = directory / CARD
    if path.exists() and not is_ours(path):
        print(f"{path}: is not ours, and stays as it is")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a name may be no UTF-8


def is_ours(path: Path) -> bool:
    """Return whether a command wrote this card, and nobody has claimed it since."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def run_card(name: str, report: Mapping[str, Any]) -> str:
    """Return the card of the run whose `run.json` this is."""
    options = report["options"]
    base = report["base"]
    if report["method"] == "lora":
        kind = f"A LoRA adapter (rank {options['r']}, alpha {options['lora_alpha']}) of"
        metadata = _metadata(base, "peft", "lora")
        load = LOAD_ADAPTER
    else:
        kind = "A full fine-tuning of"
        metadata = _metadata(base, "transformers", "full-fine-tuning")
        load = LOAD_MODEL

    sources = options["book"] or [options["data"]]
    trained_on = ", ".join(Path(source).name for source in sources)
    prose = [
        f"{kind} {_link(base)}, trained on {trained_on}: {report['steps']:,} steps of batch "
        f"{options['batch_size']} at a peak learning rate of {options['lr']:g}.",
        _score_table(report),
        f"Measured on {_validation_part(options)}. Perplexity is exp(loss).",
    ]
    if options["data"]:
        prose.append("It answers conversations in the form of its chat template.")
    return _compose(name, metadata + _model_index(name, report), prose, load)


def merge_card(name: str, base: str, adapter: bool) -> str:
    """Return the card of a base with an adapter merged into it, or of the base in a precision."""
    merged = "with a LoRA adapter merged into its weights" if adapter else "in another precision"
    prose = [f"{_link(base)} {merged}."]
    return _compose(name, _metadata(base, "transformers", "merge"), prose, LOAD_MODEL)


def _compose(name: str, metadata: list[str], prose: list[str], load: str) -> str:
    head = ["---", MARK, LICENCE, *metadata, "---"]
    parts = ["\n".join(head), f"# {name}", *prose, f"```python\n{load}\n```"]
    return "\n\n".join(parts) + "\n"


def _metadata(base: str, library: str, tag: str) -> list[str]:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- gpt2"]
    lines.append(f"- {tag}")
    repository = _repository(base)
    if repository:
        lines.insert(0, f"base_model: {json.dumps(repository)}")
    return lines


def _repository(base: str) -> str | None:
    """Return the base's repository on the hub; None if it is a directory."""
    name, _ = split_revision(stock_name(base))
    return None if name.startswith("./") else name


def _link(base: str) -> str:
    repository = _repository(base)
    if repository is None:
        return f"`{stock_name(base)}` (a local base: not on the hub)"
    return f"[{repository}](https://huggingface.co/{repository})"


def _validation_part(options: Mapping[str, Any]) -> str:
    """Say on what the losses were measured."""
    if options["val_data"]:
        return Path(options["val_data"]).name
    sources = options["book"] or [options["data"]]
    names = ", ".join(Path(source).name for source in sources)
    part = f"the last {100 * options['val_fraction']:g} % of {names}"
    if options["label_shift"] != 1:
        part += f", each position scored {options['label_shift']} tokens on"
    return part


def _score_table(report: Mapping[str, Any]) -> str:
    lines = ["| | validation loss | perplexity |", "|---|---:|---:|"]
    for who, state in (("the base", "base"), ("this model", "best")):
        loss = report[f"{state}_val_loss"]
        lines.append(f"| {who} | {loss:.4f} | {report[f'{state}_val_perplexity']:.2f} |")
    return "\n".join(lines)


def _model_index(name: str, report: Mapping[str, Any]) -> list[str]:
    """Return the results in the form of which the hub makes a table."""
    metrics = {
        "loss": f"{report['best_val_loss']:.4f}",
        "perplexity": f"{report['best_val_perplexity']:.2f}",
        "bits_per_byte": f"{report['best_val_bits_per_byte']:.4f}",
    }
    lines = [
        "model-index:",
        f"- name: {json.dumps(name)}",
        "  results:",
        "  - task:",
        "      type: text-generation",
        "    dataset:",
        "      type: text",
        f"      name: {json.dumps(_validation_part(report['options']))}",
        "    metrics:",
    ]
    for metric, value in metrics.items():
        lines += [f"    - type: {metric}", f"      value: {value}"]
    return lines
