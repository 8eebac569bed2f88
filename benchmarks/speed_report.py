"""Turn the measurements of `speed.py` into ratios, tables and pictures."""

import itertools
import statistics
from collections.abc import Iterator

import numpy as np

from common.cli import print_table
from common.figures import can_draw, save_figure, subplots
from training.report import COLOURS

COLUMNS = {"seconds": ("seconds", "{:.4g}"), "peak_mb": ("peak MB", "{:,.0f}"),
           "share_of_limit": ("matmuls' share", "{:.0%}"), "faster": ("times faster", "{:.2f}"),
           "bytes": ("bytes a step", "{:,.0f}"), "all_reduce": ("all-reduce alone, s", "{:.4f}")}
AXES = {"batch_size": "windows of 128 tokens per batch",
        "block_size": "tokens per window, 4 windows per batch",
        "r": "rank, 16 windows of 128 tokens", "ranks": "data-parallel ranks on this machine"}
Rounds = dict[int, dict]  # a contender's record of each round


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(measurements: list[dict]) -> dict:
    """Return each contender's figures over the rounds, and the ratios within each round."""
    rounds: dict[str, Rounds] = {}
    limits = {(r["precision"], r["round"]): r for r in measurements if r["kind"] == "matmuls"}
    for record in measurements:
        if record["kind"] != "matmuls":
            rounds.setdefault(record["name"], {})[record["round"]] = record
    return {"contenders": {name: figures(records, rounds, limits)
                           for name, records in rounds.items()},
            "ratios": list(ratios(rounds))}


def figures(records: Rounds, rounds: dict[str, Rounds], limits: dict) -> dict:
    first = next(iter(records.values()))
    found = {key: [r[key] for r in records.values()]
             for key in ("peak_mb", "bytes", "all_reduce") if key in first}
    found["seconds"] = [r["median"] for r in records.values()]
    found["share_of_limit"] = [limits[r["precision"], i][r["method"]] / r["median"]
                               for i, r in records.items()
                               if r["kind"] == "train" and (r["precision"], i) in limits]
    if alone := rounds.get(f"{first['contender']}, ranks 1"):
        found["faster"] = quotient(alone, records, "median")["rounds"]
    return {"contender": first["contender"], "axis": first["axis"], "size": first.get(first["axis"])
            } | {key: spread(values) for key, values in found.items() if values}


def ratios(rounds: dict[str, Rounds]) -> Iterator[dict]:
    """Yield, for the same work, their time over ours and our memory over theirs, by rounds."""
    same = ("kind", "method", "precision", "axis", "batch_size", "block_size", "r")
    for (ours, here), (theirs, there) in itertools.product(rounds.items(), repeat=2):
        a, b = next(iter(here.values())), next(iter(there.values()))
        if (a["side"], b["side"]) == ("ours", "theirs") and b["compile"] <= a["compile"] and all(
                a[key] == b[key] for key in same):
            yield {"theirs": theirs, "ours": ours, "time": quotient(there, here, "median"),
                   "memory": quotient(here, there, "peak_mb")}


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
    print_table(("", *(COLUMNS[key][0] for key in columns)), [
        (name, *(text(figures[key], COLUMNS[key][1]) if key in figures else "-"
                 for key in columns)) for name, figures in contenders])
    if summary["ratios"]:
        print("\nratios within each round; above 1 we are faster, below 1 we are smaller\n")
        print_table(("theirs", "ours", "time, theirs / ours", "memory, ours / theirs"), [
            (r["theirs"], r["ours"], text(r["time"]), text(r["memory"]))
            for r in summary["ratios"]])


def draw(results: dict, path) -> None:
    contenders, ratios = results["summary"]["contenders"], results["summary"]["ratios"][::-1]
    along = any(figures["axis"] for figures in contenders.values())
    if (along or ratios) and can_draw():
        figure = draw_axes(contenders) if along else draw_ratios(ratios)
        many = results["rounds"]
        how = "one round"
        if many > 1:
            how = f"median of {many} rounds, and from the minimum to the maximum"
        figure.suptitle(f"{results['base']}, {results['machine']}, {results['date'][:10]}\n{how}",
                        fontsize=10)
        save_figure(figure, path)


def draw_ratios(ratios: list[dict]):
    """Draw each ratio's median, with a line from the minimum to the maximum of the rounds."""
    figure, axes = subplots(figsize=(11, 1.6 + 0.32 * len(ratios)))
    for i, time in enumerate(ratio["time"] for ratio in ratios):
        axes.plot([time["min"], time["max"]], [i, i], color=COLOURS["lora"], linewidth=3,
                  solid_capstyle="butt")
        axes.plot(time["median"], i, "o", color=COLOURS["lora"])
        axes.annotate(f"{time['median']:.2f}", (time["median"], i), xytext=(0, 5),
                      textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(1, color=COLOURS["base"], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(ratios)), [f"{r['theirs']}  /  {r['ours']}" for r in ratios],
                    fontsize=8)
    axes.set_ylim(-0.6, len(ratios) - 0.2)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [x for x in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4) if low < x < high]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set_xlabel("their time / our time, in the same round (right of 1: this project is faster)")
    axes.grid(alpha=0.3, axis="x")
    return figure


def draw_axes(contenders: dict[str, dict]):
    """Draw step time above, peak memory below; a column for each axis."""
    shown = list(dict.fromkeys(f["axis"] for f in contenders.values()))
    figure, panels = subplots(2, len(shown), figsize=(max(6, 4.5 * len(shown)), 7), squeeze=False)
    for (row, column), axes in np.ndenumerate(panels):
        key, label = (("seconds", "seconds per step"),
                      ("peak_mb", "peak memory of a process (MB)"))[row]
        of_axis = [f for f in contenders.values() if f["axis"] == shown[column]]
        for name in dict.fromkeys(f["contender"] for f in of_axis):
            points = {f["size"]: f[key] for f in of_axis if f["contender"] == name}
            sizes = sorted(points)
            colour = COLOURS["lora" if name.startswith("this project, LoRA") else "full"]
            low, middle, high = ([points[size][end] for size in sizes]
                                 for end in ("min", "median", "max"))
            axes.plot(sizes, middle, "o-", color=colour, label=name)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.2)
        axes.set_xticks(sizes, sizes, fontsize=8)
        axes.set(xlabel=AXES[shown[column]], ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    return figure
