"""Turn the measurements of `speed.py` into ratios, tables and pictures."""

import statistics
import textwrap
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import print_table
from common.figures import BASE, LORA, OTHER, PAGE_WIDTH, can_draw, save_figure, subplots

COLUMNS = {
    "seconds": ("seconds", "{:.4g}"),
    "peak_mb": ("peak MB", "{:,.0f}"),
    "share_of_limit": ("matmuls' share", "{:.0%}"),
    "faster": ("times faster", "{:.2f}"),
    "bytes": ("bytes a step", "{:,.0f}"),
    "all_reduce": ("all-reduce alone, s", "{:.4f}"),
}
AXES = {
    "batch_size": "windows of 128 tokens per batch",
    "block_size": "tokens per window, 4 windows per batch",
    "r": "rank, 16 windows of 128 tokens",
    "ranks": "data-parallel ranks on this machine",
}
Spread = dict[str, float]  # median, min and max
Rounds = dict[int, dict]  # a contender's record of each round
SAME_WORK = ("kind", "method", "precision", "axis", "batch_size", "block_size", "r")


def spread(values: list[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(measurements: list[dict]) -> dict:
    """Return each contender's figures over the rounds, and the ratios within each round."""
    rounds: dict[str, Rounds] = {}
    for record in measurements:
        rounds.setdefault(record["name"], {})[record["round"]] = record
    return {
        "contenders": {name: figures(records, rounds) for name, records in rounds.items()},
        "ratios": list(ratios(rounds)),
    }


def figures(records: Rounds, rounds: dict[str, Rounds]) -> dict:
    """Return a contender's figures over the rounds; `rounds` has all the contenders'."""
    first = next(iter(records.values()))
    found = {}
    for key in ("peak_mb", "bytes", "all_reduce"):
        if key in first:
            found[key] = [record[key] for record in records.values()]
    found["seconds"] = [record["median"] for record in records.values()]
    if "matmul_seconds" in first:
        found["share_of_limit"] = [r["matmul_seconds"] / r["median"] for r in records.values()]

    alone = rounds.get(f"{first['contender']}, ranks 1")
    if alone:
        found["faster"] = quotients(alone, records, "median")

    return {
        "contender": first["contender"],
        "axis": first["axis"],
        "size": first.get(first["axis"]),
        **{key: spread(values) for key, values in found.items()},
    }


def ratios(rounds: dict[str, Rounds]) -> Iterator[dict]:
    """Yield, for the same work, their time over ours and our memory over theirs, by rounds."""
    for (ours, here), (theirs, there) in product(rounds.items(), repeat=2):
        if compares(next(iter(here.values())), next(iter(there.values()))):
            time = quotients(there, here, "median")
            memory = quotients(here, there, "peak_mb")
            yield {
                "theirs": theirs,
                "ours": ours,
                "time": {"rounds": time, **spread(time)},
                "memory": {"rounds": memory, **spread(memory)},
            }


def compares(here: dict, there: dict) -> bool:
    """Return whether these are records of ours and theirs for the same work. Ours compiled is
    compared with theirs as they come, too.
    """
    if here["side"] != "ours" or there["side"] != "theirs":
        return False
    if there["compile"] and not here["compile"]:
        return False
    return all(here[key] == there[key] for key in SAME_WORK)


def quotients(over: Rounds, under: Rounds, key: str) -> list[float]:
    """Return the quotient of each round that both have."""
    return [over[i][key] / under[i][key] for i in sorted(over.keys() & under.keys())]


def text(values: Spread, form: str = "{:.2f}") -> str:
    """Write the median, and from where to where the rounds reach."""
    median = form.format(values["median"])
    if values["min"] == values["max"]:
        return median
    return f"{median} ({form.format(values['min'])}..{form.format(values['max'])})"


def print_report(summary: dict) -> None:
    print("\nof a step, a batch scored, a text generated: median of the rounds (least..most)\n")
    print_contenders(summary["contenders"])
    if summary["ratios"]:
        print("\nratios within each round; above 1 we are faster, below 1 we are smaller\n")
        print_table(
            ("theirs", "ours", "time, theirs / ours", "memory, ours / theirs"),
            [
                (r["theirs"], r["ours"], text(r["time"]), text(r["memory"]))
                for r in summary["ratios"]
            ],
        )


def print_contenders(contenders: dict[str, dict]) -> None:
    """Print a row for each contender, and a column for each figure that one of them has."""
    known = set().union(*contenders.values())
    columns = [key for key in COLUMNS if key in known]
    headings = [COLUMNS[key][0] for key in columns]

    rows = []
    for name, found in contenders.items():
        row = [name]
        for key in columns:
            _, form = COLUMNS[key]
            row.append(text(found[key], form) if key in found else "-")
        rows.append(row)
    print_table(("", *headings), rows)


def draw(results: dict, path: Path) -> None:
    contenders = list(results["summary"]["contenders"].values())
    ratios = results["summary"]["ratios"]
    along = any(figures["axis"] for figures in contenders)
    if not can_draw() or not (along or ratios):
        return

    figure = draw_axes(contenders) if along else draw_ratios(ratios)
    how = "one round"
    if results["rounds"] > 1:
        how = f"{results['rounds']} rounds: median, minimum and maximum"
    day = results["date"][:10]
    title = textwrap.fill(f"{results['base']}, {results['machine']}, {day}", 95)
    figure.suptitle(f"{title}\n{how}", fontsize=10)
    save_figure(figure, path)


def points(spreads: list[Spread]) -> tuple[list[float], np.ndarray]:
    """Return medians, and how far below and above each the rounds reach: matplotlib's errors."""
    medians = [values["median"] for values in spreads]
    below = [values["median"] - values["min"] for values in spreads]
    above = [values["max"] - values["median"] for values in spreads]
    return medians, np.array([below, above])


def draw_ratios(ratios: list[dict]) -> Any:
    figure, axes = subplots(figsize=(PAGE_WIDTH, 1.6 + 0.32 * len(ratios)))
    medians, errors = points([ratio["time"] for ratio in ratios])
    labels = [f"{r['theirs']}  /  {r['ours']}:  {r['time']['median']:.2f}" for r in ratios]
    rows = range(len(ratios), 0, -1)  # the first on top

    axes.errorbar(medians, rows, xerr=errors, fmt="o", color=LORA, elinewidth=3)
    axes.axvline(1, color=BASE, linestyle="--", linewidth=1)
    axes.set_yticks(rows, labels)
    axes.set_xlabel(
        "their time / our time, in the same round\n(right of 1: this project is faster)"
    )
    axes.grid(visible=False, axis="y")
    return figure


def draw_axes(contenders: list[dict]) -> Any:
    """Draw step time on the left, peak memory on the right; a row for each axis."""
    shown = list(dict.fromkeys(found["axis"] for found in contenders))
    measures = {"seconds": "seconds per step", "peak_mb": "peak memory of a process (MB)"}
    size = (PAGE_WIDTH, 0.8 + 2.8 * len(shown))
    figure, panels = subplots(len(shown), 2, figsize=size, squeeze=False)

    for axes, (axis, key) in zip(panels.flat, product(shown, measures), strict=True):
        draw_axis(axes, [found for found in contenders if found["axis"] == axis], key)
        axes.set(xlabel=AXES[axis], ylabel=measures[key], xlim=(0, None), ylim=(0, None))
    names = panels[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2)
    return figure


def draw_axis(axes: Any, contenders: list[dict], key: str) -> None:
    """Draw a line for each contender over its sizes."""
    names = dict.fromkeys(found["contender"] for found in contenders)
    for name, colour in zip(names, (LORA, OTHER), strict=False):
        mine = [found for found in contenders if found["contender"] == name]
        sizes = [found["size"] for found in mine]
        medians, errors = points([found[key] for found in mine])
        axes.errorbar(sizes, medians, yerr=errors, fmt="o-", color=colour, label=name)
        axes.set_xticks(sizes, sizes)
