"""Compare finished runs and their bases: a table, and a picture beside the first run."""

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import print_table
from common.errors import UserError
from common.figures import BASE, METHODS, PAGE_WIDTH, can_draw, draw_at, save_figure, subplots
from training.report import best_weights, perplexity, read_run

PICTURE = "compare.png"
SWEEP_TABLE = "sweep.md"
SWEEP_PICTURE = "sweep.png"
COLUMNS = (
    "",
    "batch",
    "peak lr",
    "steps",
    "trained",
    "val loss",
    "perplexity",
    "bits/byte",
    "seconds",
    "tokens/s",
    "peak MB",
    "MB on disk",
)


class FinishedRun(NamedTuple):
    """A run's directory, the name that tells it from the others, and its `run.json`."""

    directory: Path
    name: str
    report: dict[str, Any]


def compare(directories: Sequence[Path]) -> None:
    """Print the table of finished runs and their bases, and draw it beside the first run.

    Raises UserError for a directory without a finished run.
    """
    directories = [d for d in directories if not is_our_file(d)] or directories
    groups = comparable_groups(read_runs(directories))
    if len(groups) > 1:
        print(
            "note: these runs differ in base, book, split, block or label shift; losses compare "
            "only within a base and the runs below it"
        )
    rows = []
    for runs in groups:
        rows.append(_base_cells(runs[0].report))
        rows += [_run_cells(run) for run in runs]
    print_table(COLUMNS, rows)
    draw_comparison(groups, directories[0].resolve().parent / PICTURE)


def is_our_file(path: Path) -> bool:
    """Return whether a comparison or a sweep wrote this file, which `runs/*` also names."""
    return path.name in (PICTURE, SWEEP_TABLE, SWEEP_PICTURE) and path.is_file()


def read_runs(directories: Sequence[Path]) -> list[FinishedRun]:
    """Read finished runs; each is named after its directory, or its path if two are named alike."""
    names = [os.path.basename(os.path.realpath(directory)) for directory in directories]
    if len(set(names)) < len(names):  # as with a/lora and b/lora
        names = [str(directory) for directory in directories]
    return [
        FinishedRun(directory, name, read_run(directory))
        for directory, name in zip(directories, names, strict=True)
    ]


def comparable_groups(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Group the runs whose losses are comparable: of one base, measured on the same tokens."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        options = run.report["options"]
        measure = [
            run.report["base_sha256"],
            run.report["book_sha256"],
            options.get("val_fraction"),
            options.get("block_size"),
            options.get("label_shift"),
        ]
        groups.setdefault(str(measure), []).append(run)
    return list(groups.values())


def _base_cells(report: dict[str, Any]) -> list[str]:
    """Return the row of a run's base, whose loss is measured on the run's validation part."""
    loss = report["base_val_loss"]
    best = report["best_val_loss"]
    bits = "-"
    if best:  # on the same text, bits per byte are proportional to the loss
        bits = f"{report['best_val_bits_per_byte'] * loss / best:.4f}"
    scores = [f"{loss:.4f}", f"{perplexity(loss):.2f}", bits]
    return [f"base {report['base']}", "-", "-", "-", "0", *scores, "-", "-", "-", "-"]


def _run_cells(run: FinishedRun) -> list[str]:
    """Return a run's row. Raises UserError if its weights are missing."""
    report = run.report
    options = report["options"]
    weights = best_weights(run.directory, report["method"])
    if not weights.is_file():
        raise UserError(f"{weights}: is missing; the run is not whole")
    return [
        f"{report['method']} ({run.name})",
        f"{options['batch_size']:,}",
        f"{options['lr']:g}",
        f"{report['steps']:,}",
        f"{report['trainable_parameters']:,}",
        f"{report['best_val_loss']:.4f}",
        f"{perplexity(report['best_val_loss']):.2f}",
        f"{report['best_val_bits_per_byte']:.4f}",
        f"{report['seconds']:,.0f}",
        f"{report['tokens_per_second']:,.0f}",
        f"{report['peak_memory_mb']:,.0f}",
        f"{weights.stat().st_size / 1e6:,.2f}",
    ]


class Bar(NamedTuple):
    """What the picture shows of a run or a base; a base has neither parameters nor seconds."""

    label: str
    colour: str
    perplexity: float
    parameters: float = math.nan
    seconds: float = math.nan


def draw_comparison(groups: Sequence[Sequence[FinishedRun]], path: Path) -> None:
    """Draw validation perplexity, each base before its runs, and parameters and time of each run.

    The losses of a group's runs are comparable.
    """
    if not can_draw():
        return
    bars = []
    for runs in groups:
        bars.append(_base_bar(runs[0].report))
        bars += [_run_bar(run) for run in runs]

    size = (PAGE_WIDTH, 1.2 + 0.5 * len(bars))
    figure, (scores, sizes, times) = subplots(1, 3, figsize=size, sharey=True)
    figure.suptitle("Finished runs and their bases: lower perplexity is better")
    _draw_panel(scores, "perplexity", bars, [bar.perplexity for bar in bars], "{:.1f}")
    _draw_panel(
        sizes, "trained parameters (log)", bars, [float(bar.parameters) for bar in bars], "{:,.0f}"
    )
    _draw_panel(times, "seconds, with validation", bars, [bar.seconds for bar in bars], "{:,.0f}")
    scores.set_yticks(range(len(bars)), [bar.label for bar in bars], parse_math=False)
    scores.set_ylim(len(bars) - 0.5, -0.5)
    most = max(run.report["trainable_parameters"] for runs in groups for run in runs)
    sizes.set(xscale="log", xlim=(1, most**1.6))
    for axes in (scores, sizes, times):  # the numbers stand at the bars
        draw_at(axes.xaxis, [])
    save_figure(figure, path)
    print(f"drawn in {path}")


def _draw_panel(
    axes: Any, title: str, bars: Sequence[Bar], widths: Sequence[float], form: str
) -> None:
    """Draw a bar a row, with its number at its end and the axis wide enough for both."""
    colours = [bar.colour for bar in bars]
    drawn = axes.barh(range(len(bars)), widths, 0.6, color=colours)
    axes.bar_label(drawn, [form.format(width) for width in widths], padding=3)
    axes.set_title(title)
    axes.grid(visible=False)
    axes.margins(x=0.45)
    axes.spines["bottom"].set_visible(False)


def _base_bar(report: dict[str, Any]) -> Bar:
    label = _label("base", Path(report["base"]).name)
    return Bar(label, BASE, perplexity(report["base_val_loss"]))


def _run_bar(run: FinishedRun) -> Bar:
    report = run.report
    method = report["method"]
    return Bar(
        _label(method, run.name),
        METHODS[method],
        perplexity(report["best_val_loss"]),
        report["trainable_parameters"],
        report["seconds"],
    )


def _label(kind: str, name: str) -> str:
    """Return a bar's label, in short lines."""
    lines = [kind]
    for part in f"({name})".replace(",", ",\n").split("\n"):
        lines += textwrap.wrap(part, 20)
    return "\n".join(lines)
