"""Turn the measurements of `speed.py` into ratios, tables and pictures."""

import statistics
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path

import numpy as np

from common.cli import print_table
from common.figures import can_draw, save_figure, subplots
from training.report import COLOURS

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
Rounds = dict[int, dict]  # a contender's record of each round


def spread(values: list[float]) -> dict[str, float]:
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
    first = next(iter(records.values()))
    found = {
        key: [r[key] for r in records.values()]
        for key in ("peak_mb", "bytes", "all_reduce")
        if key in first
    }
    found["seconds"] = [r["median"] for r in records.values()]
    if "matmul_seconds" in first:
        found["share_of_limit"] = [r["matmul_seconds"] / r["median"] for r in records.values()]
    if alone := rounds.get(f"{first['contender']}, ranks 1"):
        found["faster"] = quotient(alone, records, "median")["rounds"]
    return {
        "contender": first["contender"],
        "axis": first["axis"],
        "size": first.get(first["axis"]),
        **{key: spread(values) for key, values in found.items()},
    }


def ratios(rounds: dict[str, Rounds]) -> Iterator[dict]:
    """Yield, for the same work, their time over ours and our memory over theirs, by rounds."""
    same = ("kind", "method", "precision", "axis", "batch_size", "block_size", "r")
    for (ours, here), (theirs, there) in product(rounds.items(), repeat=2):
        a, b = next(iter(here.values())), next(iter(there.values()))
        if (
            (a["side"], b["side"]) == ("ours", "theirs")
            and b["compile"] <= a["compile"]
            and all(a[key] == b[key] for key in same)
        ):
            yield {
                "theirs": theirs,
                "ours": ours,
                "time": quotient(there, here, "median"),
                "memory": quotient(here, there, "peak_mb"),
            }


def quotient(over: Rounds, under: Rounds, key: str) -> dict:
    values = [over[i][key] / under[i][key] for i in sorted(over.keys() & under.keys())]
    return {"rounds": values, **spread(values)}


def text(values: dict[str, float], form: str = "{:.2f}") -> str:
    """Write the median, and from where to where the rounds reach."""
    median, low, high = (form.format(values[key]) for key in ("median", "min", "max"))
    return f"{median} ({low}..{high})" if values["min"] < values["max"] else median


def print_report(summary: dict) -> None:
    contenders = summary["contenders"].items()
    columns = [key for key in COLUMNS if any(key in figures for _, figures in contenders)]
    print("\nof a step, a batch scored, a text generated: median of the rounds (least..most)\n")
    print_table(
        ("", *(COLUMNS[key][0] for key in columns)),
        [
            (
                name,
                *(
                    text(figures[key], COLUMNS[key][1]) if key in figures else "-"
                    for key in columns
                ),
            )
            for name, figures in contenders
        ],
    )
    if summary["ratios"]:
        print("\nratios within each round; above 1 we are faster, below 1 we are smaller\n")
        print_table(
            ("theirs", "ours", "time, theirs / ours", "memory, ours / theirs"),
            [
                (r["theirs"], r["ours"], text(r["time"]), text(r["memory"]))
                for r in summary["ratios"]
            ],
        )


def draw(results: dict, path: Path) -> None:
    contenders, ratios = results["summary"]["contenders"].values(), results["summary"]["ratios"]
    along = any(figures["axis"] for figures in contenders)
    if (along or ratios) and can_draw():
        figure = draw_axes(contenders) if along else draw_ratios(ratios)
        rounds = results["rounds"]
        how = f"{rounds} rounds: median, minimum and maximum" if rounds > 1 else "one round"
        figure.suptitle(
            f"{results['base']}, {results['machine']}, {results['date'][:10]}\n{how}", fontsize=10
        )
        save_figure(figure, path)


def points(spreads: list[dict[str, float]]) -> tuple[list[float], np.ndarray]:
    """Return medians, and how far below and above each the rounds reach: matplotlib's errors."""
    low, middle, high = ([values[key] for values in spreads] for key in ("min", "median", "max"))
    return middle, np.subtract([middle, high], [low, middle])


def draw_ratios(ratios: list[dict]):
    figure, axes = subplots(figsize=(11, 1.6 + 0.32 * len(ratios)))
    medians, errors = points([ratio["time"] for ratio in ratios])
    rows = range(len(ratios), 0, -1)  # the first on top
    axes.errorbar(medians, rows, xerr=errors, fmt="o", color=COLOURS["lora"], elinewidth=3)
    axes.axvline(1, color=COLOURS["base"], linestyle="--", linewidth=1)
    axes.set_yticks(
        rows,
        [f"{r['theirs']}  /  {r['ours']}:  {r['time']['median']:.2f}" for r in ratios],
        fontsize=8,
    )
    axes.set_xlabel("their time / our time, in the same round (right of 1: this project is faster)")
    axes.grid(alpha=0.3, axis="x")
    return figure


def draw_axes(contenders: Collection[dict]):
    """Draw step time above, peak memory below; a column for each axis."""
    shown, names = (
        list(dict.fromkeys(f[key] for f in contenders)) for key in ("axis", "contender")
    )
    figure, panels = subplots(2, len(shown), figsize=(max(6, 4.5 * len(shown)), 7), squeeze=False)
    measures = {"seconds": "seconds per step", "peak_mb": "peak memory of a process (MB)"}
    for axes, (key, axis) in zip(panels.flat, product(measures, shown), strict=True):
        for name, colour in zip(names, (COLOURS["lora"], COLOURS["full"]), strict=False):
            mine = [f for f in contenders if (f["axis"], f["contender"]) == (axis, name)]
            sizes, (medians, errors) = [f["size"] for f in mine], points([f[key] for f in mine])
            axes.errorbar(sizes, medians, yerr=errors, fmt="o-", color=colour, label=name)
        axes.set_xticks(sizes, sizes, fontsize=8)
        axes.set(xlabel=AXES[axis], ylabel=measures[key], xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    return figure
