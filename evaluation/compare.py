"""Compare finished runs: `evaluate.py --compare`."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import print_table
from common.figures import METHODS, PAGE_WIDTH, can_draw, new_figure, save_figure
from evaluation.scores import perplexity
from storage.runs import read_run

# Map the title of a table column to a key of run.json, or of its options, and to a format.
COLUMNS = {
    "batch": ("batch_size", "{:,}"),
    "peak lr": ("lr", "{:g}"),
    "steps": ("steps", "{:,}"),
    "trained": ("trainable_parameters", "{:,}"),
    "val loss": ("best_val_loss", "{:.4f}"),
    "perplexity": ("best_val_perplexity", "{:.2f}"),
    "bits/byte": ("best_val_bits_per_byte", "{:.4f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "peak MB": ("peak_memory_mb", "{:,.0f}"),
}


class Entry(NamedTuple):
    """A finished run or a base. `numbers` has keys of `COLUMNS`, fewer for a base."""

    name: str
    method: str  # or "base"
    numbers: Mapping[str, Any]


def compare(paths: Sequence[Path]) -> None:
    """Print a table of finished runs and their bases. Draw compare.png in the directory that
    contains the first run's directory.
    """
    # runs/* also names compare.png.
    directories = [path for path in paths if not path.is_file()] or paths
    groups: dict[str, list[Entry]] = {}
    for directory in directories:
        run = read_run(directory)
        group = groups.setdefault(_measure(run), [_base_entry(run)])
        group.append(_run_entry(directory, run))
    if len(groups) > 1:
        print(
            "note: the runs differ in base, quantisation, book, split, block size or label shift. "
            "Compare losses only between a base and the runs below it"
        )
    entries = list(chain.from_iterable(groups.values()))
    print_table(["", *COLUMNS], [_row(entry) for entry in entries])
    draw(entries, directories[0].resolve().parent / "compare.png")


def _measure(run: Mapping[str, Any]) -> str:
    """Return a string that identifies the base and the scored tokens. Runs with equal strings are
    comparable."""
    names = ("quantise", "val_fraction", "block_size", "label_shift")
    options = [run["options"].get(name) for name in names]
    return str([run["base_sha256"], run["book_sha256"], options])


def _base_entry(run: Mapping[str, Any]) -> Entry:
    loss = run["base_val_loss"]
    quantise = run["options"].get("quantise")
    name = f"base {run['base']}" + (f" ({quantise})" if quantise else "")
    numbers = {"best_val_loss": loss, "best_val_perplexity": perplexity(loss)}
    return Entry(name, "base", {"trainable_parameters": 0, **numbers})


def _run_entry(directory: Path, run: Mapping[str, Any]) -> Entry:
    both = {**run["options"], **run}
    numbers = {key: both[key] for key, _ in COLUMNS.values()}
    return Entry(f"{run['method']} ({directory})", run["method"], numbers)


def _row(entry: Entry) -> list[str]:
    cells = [entry.name]
    for key, form in COLUMNS.values():
        cells.append(form.format(entry.numbers[key]) if key in entry.numbers else "-")
    return cells


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Draw each entry's perplexity as a bar."""
    if not can_draw():
        return
    figure = new_figure((PAGE_WIDTH, 1.2 + 0.5 * len(entries)))
    axes = figure.subplots()
    names = [entry.name for entry in entries]
    widths = [entry.numbers["best_val_perplexity"] for entry in entries]
    bars = axes.barh(range(len(names)), widths, color=[METHODS[e.method] for e in entries])
    axes.bar_label(bars, fmt="{:,.1f}", padding=3)
    axes.margins(x=0.1)  # room for the numbers
    axes.set(title="Validation perplexity of finished runs and their bases: lower is better")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    save_figure(figure, path)
