"""Compare finished runs, for `evaluate.py --compare` and for the table of a sweep."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from common.cli import print_table
from common.errors import UserError
from common.figures import METHODS, PAGE_WIDTH, can_draw, draw_at, save_figure, subplots
from common.files import atomic_path
from training.directory import RUN
from training.report import best_weights, read_run
from training.scores import perplexity

# Map the title of a table column or a picture panel to a key of `Entry.numbers` and to the number's
# format.
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
    "MB on disk": ("megabytes", "{:,.2f}"),
}
PANELS = {
    "validation perplexity": ("best_val_perplexity", "{:,.1f}"),
    "trained parameters": ("trainable_parameters", "{:,}"),
    "seconds, with validation": ("seconds", "{:,.0f}"),
}


class Entry(NamedTuple):
    """A row of a comparison: a finished run or a base. For a base, `numbers` has fewer keys than
    for a run."""

    name: str
    method: str  # or "base"
    numbers: dict[str, Any]  # the keys are names in run.json


def compare(paths: Sequence[Path]) -> None:
    """Print a table of finished runs and their bases. Draw compare.png in the directory that
    contains the first run's directory.
    """
    directories = [path for path in paths if not path.is_file()] or paths
    parent = os.path.commonpath([directory.resolve().parent for directory in directories])
    groups: dict[str, list[Entry]] = {}
    for directory in directories:
        run = read_run(directory)
        name = os.path.relpath(directory.resolve(), parent)
        try:
            entry = _run_entry(name, run, directory)
            groups.setdefault(_measure(run), [_base_entry(run)]).append(entry)
        except KeyError as error:
            raise UserError(
                f"{directory / RUN}: has no {error.args[0]}; train again with --overwrite"
            ) from error
    if len(groups) > 1:
        print(
            "note: the runs differ in base, quantisation, book, split, block size or label shift. "
            "Compare losses only between a base and the runs below it"
        )
    entries = list(chain.from_iterable(groups.values()))
    print_table(["", *COLUMNS], [_cells(entry) for entry in entries])
    draw_comparison(entries, directories[0].resolve().parent / "compare.png")


def _measure(run: Mapping[str, Any]) -> str:
    """Return a string that identifies the base and the scored tokens. Runs with equal strings are
    comparable."""
    names = ("quantise", "val_fraction", "block_size", "label_shift")
    options = [run["options"].get(name) for name in names]
    return str([run["base_sha256"], run["book_sha256"], options])


def _base_entry(run: Mapping[str, Any]) -> Entry:
    """Return an entry for a run's base, from the base's validation loss in `run.json`."""
    loss = run["base_val_loss"]
    numbers = {
        "trainable_parameters": 0,
        "best_val_loss": loss,
        "best_val_perplexity": perplexity(loss),
    }
    if run["best_val_loss"]:  # on the same text, bits per byte are proportional to the loss
        bits_per_nat = run["best_val_bits_per_byte"] / run["best_val_loss"]
        numbers["best_val_bits_per_byte"] = bits_per_nat * loss
    name = f"base {run['base']}"
    quantise = run["options"].get("quantise")
    if quantise:
        name += f" ({quantise})"
    return Entry(name, "base", numbers)


def _run_entry(name: str, run: Mapping[str, Any], directory: Path) -> Entry:
    method = run["method"]
    weights = best_weights(directory, method)
    if not weights.is_file():
        raise UserError(f"{weights}: is missing; the run is not complete")
    numbers = {**run["options"], **run, "megabytes": weights.stat().st_size / 1e6}
    return Entry(f"{method} ({name})", method, numbers)


def _cells(entry: Entry) -> list[str]:
    cells = [entry.name]
    for name, form in COLUMNS.values():
        known = name in entry.numbers
        cells.append(form.format(entry.numbers[name]) if known else "-")
    return cells


def draw_comparison(entries: Sequence[Entry], path: Path) -> None:
    """Draw each entry's perplexity, trained parameters and time as bars."""
    if not can_draw():
        return
    rows = range(len(entries))
    figure, panels = subplots(1, 3, figsize=(PAGE_WIDTH, 1.2 + 0.5 * len(rows)), sharey=True)
    figure.suptitle("Finished runs and their bases: lower perplexity is better")
    for axes, (title, (name, form)) in zip(panels, PANELS.items(), strict=True):
        widths = [entry.numbers.get(name, math.nan) for entry in entries]
        bars = axes.barh(rows, widths, 0.6, color=[METHODS[entry.method] for entry in entries])
        axes.bar_label(bars, [form.format(width) for width in widths], padding=3)
        axes.set_title(title)
        axes.margins(x=0.45)  # room for the numbers
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        draw_at(axes.xaxis, [])
    labels = [textwrap.fill(entry.name, 24) for entry in entries]
    panels[0].set_yticks(rows, labels, parse_math=False)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    save_figure(figure, path)


class Setting(NamedTuple):
    """The learning rate and rank of a row of a sweep's table. Full fine-tuning has no rank."""

    lr: float
    r: int | None


def report_sweep(method: str, losses: Mapping[Setting, Sequence[float]], out: Path) -> None:
    """Print a table, and write it to `sweep.md`. A row contains the mean and the range of the
    losses and perplexities of one setting's runs.
    """
    rows = []
    for setting, values in losses.items():
        name = f"lr {setting.lr:g}"
        if setting.r:
            name += f", r {setting.r}"
        perplexities = [perplexity(loss) for loss in values]
        cells = _mean_and_range(values, digits=4) + _mean_and_range(perplexities, digits=2)
        rows.append([name, str(len(values)), *cells])
    columns = (method, "runs", "val loss", "min .. max", "perplexity", "min .. max")
    text = print_table(columns, rows)
    with atomic_path(out / "sweep.md") as temporary:
        temporary.write_text(text + "\n")


def _mean_and_range(values: Sequence[float], digits: int) -> list[str]:
    least = f"{min(values):.{digits}f}"
    most = f"{max(values):.{digits}f}"
    return [f"{mean(values):.{digits}f}", f"{least} .. {most}"]
