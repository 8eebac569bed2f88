"""What `speed.py` makes of its measurements: ratios round by round, tables and pictures."""

import statistics
from collections.abc import Iterator

from cli import print_table
from plots import COLOURS, pyplot, save_figure

TITLES = {"train": "training, seconds a step", "evaluate": "evaluation, seconds a batch",
          "generate": "generation, seconds a text", "save": "saving an adapter, seconds",
          "load": "loading an adapter on a built base, seconds"}
UNITS = {"batch_size": "windows a batch", "block_size": "tokens a window", "r": "rank"}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(measurements: list[dict]) -> dict:
    """Each contender's figures over the rounds, and the ratios within each round."""
    rounds: dict[str, dict[int, dict]] = {}
    limits = {}
    for record in measurements:
        if record["kind"] == "products":
            limits[record["precision"], record["round"]] = record["limits"]
        else:
            rounds.setdefault(record["name"], {})[record["round"]] = record
    return {"contenders": {name: contender(by_round, limits) for name, by_round in rounds.items()},
            "ratios": list(ratios(rounds)), "lora_over_full": list(lora_over_full(rounds)),
            "limits": limit_table(limits)}


def contender(by_round: dict[int, dict], limits: dict) -> dict:
    """Seconds, tokens a second, peak memory and share of the limit over the rounds."""
    records = list(by_round.values())
    figures = {"kind": records[0]["kind"],
               "seconds": spread([r["median"] for r in records]),
               "tokens_per_second": spread([r["tokens"] / r["median"] for r in records]),
               "peak_mb": spread([r["peak_mb"] for r in records])}
    shares = [limits[r["precision"], i][r["method"]]["seconds"] / r["median"]
              for i, r in by_round.items() if (r["precision"], i) in limits]
    if records[0]["kind"] == "train" and shares:
        figures["share_of_limit"] = spread(shares)
    return figures


def limit_table(limits: dict) -> dict:
    """Per precision and method: operations and seconds of a step's products over the rounds."""
    table = {}
    for precision in dict.fromkeys(precision for precision, _ in limits):
        runs = [limit for (p, _), limit in limits.items() if p == precision]
        for method in runs[0]:
            table[f"{method}, {precision}"] = {
                "flops": runs[0][method]["flops"],
                "seconds": spread([run[method]["seconds"] for run in runs])}
    return table


def ratios(rounds: dict[str, dict[int, dict]]) -> Iterator[dict]:
    """Every examiner against ours: its time over ours, our memory over its, round by round."""
    for ours, here in rounds.items():
        for theirs, there in rounds.items():
            if comparable(next(iter(here.values())), next(iter(there.values()))):
                both = sorted(here.keys() & there.keys())
                yield {"kind": here[both[0]]["kind"], "theirs": theirs, "ours": ours,
                       "time": quotient(there, here, both, "median"),
                       "memory": quotient(here, there, both, "peak_mb")}


def comparable(ours: dict, theirs: dict) -> bool:
    """The same work on both sides; for LoRA also the reference script's, PEFT in fp32."""
    same_work = all(ours[key] == theirs[key] for key in ("kind", "method"))
    if (ours["side"], theirs["side"]) != ("ours", "theirs") or not same_work:
        return False
    reference = (theirs["kind"], theirs["method"], theirs["precision"],
                 theirs["compile"]) == ("train", "lora", "fp32", False)
    return theirs["compile"] <= ours["compile"] and (
        reference or ours["precision"] == theirs["precision"])


def lora_over_full(rounds: dict[str, dict[int, dict]]) -> Iterator[dict]:
    """Our LoRA step over our full step: time and memory, round by round."""
    for lora, here in rounds.items():
        full = lora.replace(", LoRA,", ", full,")
        if lora.startswith("this project, LoRA,") and full in rounds:
            both = sorted(here.keys() & rounds[full].keys())
            yield {"lora": lora, "full": full,
                   "time": quotient(here, rounds[full], both, "median"),
                   "memory": quotient(here, rounds[full], both, "peak_mb")}


def quotient(over: dict[int, dict], under: dict[int, dict], both: list[int], key: str) -> dict:
    values = [over[i][key] / under[i][key] for i in both]
    return {"rounds": values, **spread(values)}


def text(values: dict[str, float], form: str = "{:.2f}") -> str:
    """The median, and from where to where the rounds reach."""
    median, low, high = (form.format(values[key]) for key in ("median", "min", "max"))
    return f"{median} ({low}..{high})" if values["min"] < values["max"] else median


def print_report(summary: dict) -> None:
    for kind, title in TITLES.items():
        of_kind = {name: figures for name, figures in summary["contenders"].items()
                   if figures["kind"] == kind}
        if of_kind:
            print(f"\n{title}: median of the rounds (least..most)\n")
            print_contenders(kind, of_kind)
    if summary["limits"]:
        print("\nmatrix products of a step, at the speed measured for their shapes\n")
        print_table(("", "GFLOP", "seconds", "GFLOP/s"), [
            (name, f"{limit['flops'] / 1e9:,.1f}", text(limit["seconds"], "{:.3f}"),
             f"{limit['flops'] / 1e9 / limit['seconds']['median']:,.0f}")
            for name, limit in summary["limits"].items()])
    if summary["ratios"]:
        print("\nratios within each round; above 1 we are faster, below 1 we are smaller\n")
        print_table(("theirs", "ours", "time, theirs / ours", "memory, ours / theirs"), [
            (r["theirs"], r["ours"], text(r["time"]),
             text(r["memory"]) if r["kind"] == "train" else "-") for r in summary["ratios"]])
    if summary["lora_over_full"]:
        print()
        print_table(("LoRA / full", "time", "memory"), [
            (r["lora"], text(r["time"]), text(r["memory"])) for r in summary["lora_over_full"]])


def print_contenders(kind: str, contenders: dict[str, dict]) -> None:
    columns = {"seconds": ("seconds", "{:.4g}"), "tokens_per_second": ("tokens/s", "{:,.0f}"),
               "peak_mb": ("peak MB", "{:,.0f}"), "share_of_limit": ("products' share", "{:.0%}")}
    shown = {"train": 4, "save": 1, "load": 1}.get(kind, 2)
    columns = dict(list(columns.items())[:shown])
    print_table(("", *(title for title, _ in columns.values())), [
        (name, *(text(figures[key], form) if key in figures else "-"
                 for key, (_, form) in columns.items()))
        for name, figures in contenders.items()])


def growth_series(measurements: list[dict]) -> dict[str, dict[str, dict[int, dict]]]:
    """Per axis and contender: at each size the seconds a step and the peak MB over the rounds."""
    series: dict[str, dict[str, dict[int, list[dict]]]] = {}
    for record in measurements:
        sizes = series.setdefault(record["axis"], {}).setdefault(record["contender"], {})
        sizes.setdefault(record[record["axis"]], []).append(record)
    return {axis: {name: {size: {"seconds": spread([r["median"] for r in records]),
                                 "peak_mb": spread([r["peak_mb"] for r in records])}
                          for size, records in sizes.items()}
                   for name, sizes in names.items()} for axis, names in series.items()}


def print_growth(series: dict) -> None:
    forms = {"seconds": ("s", "{:.4g}"), "peak_mb": ("MB", "{:,.0f}")}
    for axis, names in series.items():
        print(f"\n{UNITS[axis]}: seconds a step, peak MB (medians)\n")
        columns = [(name, key) for key in forms for name in names]
        sizes = sorted({size for points in names.values() for size in points})
        print_table((UNITS[axis], *(f"{name}, {forms[key][0]}" for name, key in columns)), [
            (str(size), *(forms[key][1].format(names[name][size][key]["median"])
                          if size in names[name] else "-" for name, key in columns))
            for size in sizes])


def draw_ratios(summary: dict, path) -> None:
    """Each ratio's median, with a line from the least to the most of the rounds."""
    found = summary["ratios"][::-1]
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.32 * len(found)), layout="constrained")
    for i, ratio in enumerate(found):
        time = ratio["time"]
        axes.plot([time["min"], time["max"]], [i, i], color=COLOURS["lora"], linewidth=3)
        axes.plot(time["median"], i, "o", color=COLOURS["lora"])
        axes.annotate(f"{time['median']:.2f}", (time["median"], i), xytext=(0, 5),
                      textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(1, color=COLOURS["base"], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{r['theirs']}  /  {r['ours']}" for r in found],
                    fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="their time / our time, in the same round")
    axes.grid(alpha=0.3, axis="x")
    axes.margins(y=0.05)
    save_figure(figure, path)


def draw_growth(series: dict, path) -> None:
    """Step time above, peak memory below; a column for each axis."""
    figure, panels = pyplot.subplots(2, len(series), figsize=(4.5 * len(series), 7),
                                     layout="constrained", squeeze=False)
    measures = (("seconds", "seconds a step"), ("peak_mb", "peak memory (MB)"))
    for column, (axis, by_name) in enumerate(series.items()):
        for row, (key, label) in enumerate(measures):
            axes = panels[row, column]
            for name, points in by_name.items():
                colour = COLOURS["lora" if name.startswith("this project") else "full"]
                sizes = sorted(points)
                axes.plot(sizes, [points[s][key]["median"] for s in sizes], "o-", color=colour,
                          label=name)
                axes.fill_between(sizes, [points[s][key]["min"] for s in sizes],
                                  [points[s][key]["max"] for s in sizes], color=colour, alpha=0.2)
            axes.set(xlabel=UNITS[axis], ylabel=label, xscale="log", ylim=(0, None))
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    save_figure(figure, path)
