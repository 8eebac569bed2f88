"""Turn the measurements of `speed.py` into ratios, tables and pictures."""

import statistics
import textwrap
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import print_table
from common.figures import BASE, LORA, OTHER, PAGE_WIDTH, can_draw, draw_at, save_figure, subplots

COLUMNS = {
    "seconds": ("seconds", "{:.4g}"),
    "peak_mb": ("peak MB", "{:,.0f}"),
    "alike": ("their time / ours, allocator alike", "{:.2f}"),
    "as_it_comes": ("their time / ours, theirs as it comes", "{:.2f}"),
    "memory": ("our memory / theirs as it comes", "{:.2f}"),
    "matmuls_share": ("matmuls' share", "{:.0%}"),
    "faster": ("times faster", "{:.2f}"),
    "bytes": ("bytes a step", "{:,.0f}"),
    "all_reduce": ("all-reduce alone, s", "{:.4f}"),
}
AXES = {
    "batch_size": "windows of 128 tokens per batch",
    "block_size": "tokens per window, 4 windows per batch",
    "r": "rank, 16 windows of 128 tokens",
    "parameters": "parameters of the model, 4 windows of 128 tokens",
    "ranks": "data-parallel ranks on this machine",
}
MEASURES = {"seconds": "seconds per step", "peak_mb": "peak memory of a process (MB)"}
Spread = dict[str, float]  # median, min and max
Rounds = dict[int, dict]  # a contender's record of each round
SAME_WORK = ("kind", "method", "precision")


def spread(values: list[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(measurements: list[dict]) -> dict:
    """Return each contender's figures over the rounds, the ratios within each round, and the
    exponents along each axis.
    """
    rounds: dict[str, Rounds] = {}
    for record in measurements:
        rounds.setdefault(record["name"], {})[record["round"]] = record
    contenders = {name: figures(records, rounds) for name, records in rounds.items()}
    return {
        "contenders": contenders,
        "ratios": list(ratios(rounds)),
        "exponents": list(exponents(list(contenders.values()))),
    }


def figures(records: Rounds, rounds: dict[str, Rounds]) -> dict:
    """Return the figures of a contender over the rounds. `rounds` contains all contenders."""
    first = next(iter(records.values()))
    found = {}
    for key in ("peak_mb", "matmuls_share", "bytes", "all_reduce"):
        if key in first:
            found[key] = [record[key] for record in records.values()]
    found["seconds"] = [record["median"] for record in records.values()]

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
    """Yield the ratios of each round for equal work: their time / ours, and our memory / theirs."""
    for (ours, here), (theirs, there) in product(rounds.items(), repeat=2):
        if compares(next(iter(here.values())), next(iter(there.values()))):
            pair = {
                "ours": ours,
                "theirs": theirs,
                "as_it_comes": spread(quotients(there, here, "median")),
                "memory": spread(quotients(here, there, "peak_mb")),
            }
            alike = rounds.get(f"{theirs}, allocator alike")
            if alike:
                pair["alike"] = spread(quotients(alike, here, "median"))
            yield pair


def compares(here: dict, there: dict) -> bool:
    """Return whether to compare our record `here` with their record `there`.

    Both must do the same work, and their side must use the default allocator. Our side with
    --compile is also compared with their side without --compile.
    """
    if here["side"] != "ours" or there["side"] != "theirs":
        return False
    if here["axis"] or there["allocator_alike"]:
        return False
    if there["compile"] and not here["compile"]:
        return False
    return all(here[key] == there[key] for key in SAME_WORK)


def quotients(over: Rounds, under: Rounds, key: str) -> list[float]:
    """Return the quotient of each round that both records have."""
    return [over[i][key] / under[i][key] for i in sorted(over.keys() & under.keys())]


def exponents(contenders: list[dict]) -> Iterator[dict]:
    """Yield a row for each axis and measure, over the sizes that all contenders have.

    For each contender, the row has the values at the smallest and the largest size, and the slope
    of log(value) against log(size) by least squares.
    """
    for axis, key in product(axes_of(contenders), MEASURES):
        lines: dict[str, dict[int, float]] = {}
        for found in contenders:
            if found["axis"] == axis:
                line = lines.setdefault(found["contender"], {})
                line[found["size"]] = found[key]["median"]

        sizes = sorted(set.intersection(*map(set, lines.values())))
        if len(sizes) < 2:
            continue
        row: dict = {"axis": axis, "measure": key, "from": sizes[0], "to": sizes[-1]}
        row["contenders"] = {}
        for name, line in lines.items():
            values = [line[size] for size in sizes]
            slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
            row["contenders"][name] = {
                "from": values[0],
                "to": values[-1],
                "exponent": float(slope),
            }
        yield row


def axes_of(contenders: list[dict]) -> list[str]:
    """Return the axes along which contenders were measured."""
    return [axis for axis in dict.fromkeys(found["axis"] for found in contenders) if axis]


def text(values: Spread, form: str = "{:.2f}") -> str:
    """Format the median, and the range over the rounds."""
    median = form.format(values["median"])
    if values["min"] == values["max"]:
        return median
    return f"{median} ({form.format(values['min'])}..{form.format(values['max'])})"


def print_report(summary: dict) -> None:
    print("\nof a step, a batch scored, a text generated: median of the rounds (least..most)\n")
    contenders = summary["contenders"]
    print_figures(contenders)
    if summary["ratios"]:
        print("\nours, and ratios within each round; above 1 we are faster, below 1 smaller\n")
        pairs = {}
        for ratio in summary["ratios"]:
            name = f"{ratio['ours']} : {ratio['theirs']}"
            pairs[name] = {**contenders[ratio["ours"]], **ratio}
        print_figures(pairs)
    if summary["exponents"]:
        print("\nfrom the least size to the largest; a value grows as size to the exponent\n")
        print_exponents(summary["exponents"])


def print_figures(figures: dict[str, dict]) -> None:
    """Print a row for each name, and a column for each figure that any name has."""
    known = set().union(*figures.values())
    columns = [key for key in COLUMNS if key in known]
    headings = [COLUMNS[key][0] for key in columns]

    rows = []
    for name, found in figures.items():
        row = [name]
        for key in columns:
            _, form = COLUMNS[key]
            row.append(text(found[key], form) if key in found else "-")
        rows.append(row)
    print_table(("", *headings), rows)


def print_exponents(exponents: list[dict]) -> None:
    """Print a row for each axis and measure: the sizes, and each contender's value and exponent."""
    headings = ["", "sizes"]
    for name in exponents[0]["contenders"]:
        headings += [name, "exponent"]

    rows = []
    for found in exponents:
        heading, form = COLUMNS[found["measure"]]
        row = [
            f"{heading} by {AXES[found['axis']]}",
            f"{short(found['from'])}..{short(found['to'])}",
        ]
        for line in found["contenders"].values():
            ends = f"{form.format(line['from'])}..{form.format(line['to'])}"
            row += [ends, f"{line['exponent']:.2f}"]
        rows.append(row)
    print_table(headings, rows)


def draw(results: dict, path: Path) -> None:
    contenders = list(results["summary"]["contenders"].values())
    ratios = results["summary"]["ratios"]
    along = axes_of(contenders)
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
    """Return the medians, and the distances to minimum and maximum as matplotlib's error bars."""
    medians = [values["median"] for values in spreads]
    below = [values["median"] - values["min"] for values in spreads]
    above = [values["max"] - values["median"] for values in spreads]
    return medians, np.array([below, above])


def draw_ratios(ratios: list[dict]) -> Any:
    figure, axes = subplots(figsize=(PAGE_WIDTH, 1.6 + 0.32 * len(ratios)))
    rows = range(len(ratios), 0, -1)  # the first ratio on top
    kinds = {"alike": (LORA, "allocator alike"), "as_it_comes": (OTHER, "theirs as it comes")}

    for key, (colour, label) in kinds.items():
        places = [row for row, ratio in zip(rows, ratios, strict=True) if key in ratio]
        medians, errors = points([ratio[key] for ratio in ratios if key in ratio])
        style = {"fmt": "o", "color": colour, "elinewidth": 3}
        if places:
            axes.errorbar(medians, places, xerr=errors, label=label, **style)
    axes.axvline(1, color=BASE, linestyle="--", linewidth=1)
    axes.set_yticks(rows, [f"{ratio['theirs']}  /  {ratio['ours']}" for ratio in ratios])
    figure.legend(loc="outside lower center", ncols=2)
    axes.set_xlabel(
        "their time / our time, in the same round\n(right of 1: this project is faster)"
    )
    axes.grid(visible=False, axis="y")
    return figure


def draw_axes(contenders: list[dict]) -> Any:
    """Draw step time on the left and peak memory on the right, with a row for each axis.

    Both scales are logarithmic, so the slope of a line is the exponent.
    """
    shown = axes_of(contenders)
    size = (PAGE_WIDTH, 0.8 + 2.8 * len(shown))
    scales = {"xscale": "log", "yscale": "log"}
    figure, panels = subplots(
        len(shown), 2, figsize=size, squeeze=False, sharey="col", subplot_kw=scales
    )

    for axes, key in zip(panels[0], MEASURES, strict=True):  # the panels below share these axes
        values = [found[key]["median"] for found in contenders]
        axes.set_ylim(min(values) / 2, max(values) * 2)
    for axes, (axis, key) in zip(panels.flat, product(shown, MEASURES), strict=True):
        draw_axis(axes, [found for found in contenders if found["axis"] == axis], key)
        axes.set(xlabel=AXES[axis], ylabel=MEASURES[key])
    names = panels[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2)
    return figure


def draw_axis(axes: Any, contenders: list[dict], key: str) -> None:
    """Draw a line for each contender over its sizes."""
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:,g}")
    names = dict.fromkeys(found["contender"] for found in contenders)
    for name, colour in zip(names, (LORA, OTHER), strict=False):
        mine = [found for found in contenders if found["contender"] == name]
        sizes = [found["size"] for found in mine]
        medians, errors = points([found[key] for found in mine])
        axes.errorbar(sizes, medians, yerr=errors, fmt="o-", color=colour, label=name)
        draw_at(axes.xaxis, sizes, [short(size) for size in sizes])
    axes.minorticks_off()


def short(size: int) -> str:
    """Format a size. A large size is in millions."""
    if size < 1e6:
        return str(size)
    return f"{size / 1e6:,.0f}M"
