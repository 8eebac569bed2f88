"""The numbers of each measured table, from stored files: a list for each row, from left to right.

`runs` are the results of each seed, by rate. `test_tables.py` looks for the page's numbers in these
lists. A dict of lists has the first cells of rows as keys.
"""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
FIGURES, RESULTS = ROOT / "docs" / "figures", ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"(?<![\w.-])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def stored(name):
    """Return the results in docs/figures/NAME.json."""
    return json.loads((FIGURES / f"{name}.json").read_text())["results"]


def benchmark(name):
    """Return the stored result of a benchmark, whose name ends with the processor's name."""
    found = [*RESULTS.glob(f"{name}*.json")]
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} files named {name}*.json")
    return json.loads(found[0].read_text())


def numbers(text):
    """Return the numbers of a cell or a key as text, without code, links, emphasis and commas."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\*", " ", text)
    return [number.replace(",", "") for number in NUMBER.findall(text)]


def best(runs):
    """Return the best rate and its results, among the rates with every seed."""
    most = max(map(len, runs.values()))
    means = {lr: mean(found) for lr, found in runs.items() if len(found) == most}
    lr = min(means, key=means.__getitem__)
    return float(lr), runs[lr]


def vertex(runs):
    """Return the minimum of the parabola through the best rate and its neighbours."""
    lr, _ = best(runs)
    if len(runs) == 1:  # not searched
        return lr
    y = {float(other): math.log(mean(found)) for other, found in runs.items()}
    low, middle, high = y[lr / 2], y[lr], y[lr * 2]
    return lr * 2 ** ((low - high) / (2 * (low - 2 * middle + high)))


def gap(runs, full):
    return math.log(mean(best(runs)[1]) / mean(best(full)[1]))


def stats(found, middle=mean):
    return [middle(found), min(found), max(found)]


def column_means(rows):
    return [*map(mean, zip(*rows, strict=True))]


def flat(found):
    """Return the numbers of a stored result, from left to right: of a key its numbers, of a list
    the mean, least and greatest, and of runs these at the best rate, between the best rate as tried
    and as the vertex, since a table has the rate on the left or on the right.
    """
    if isinstance(found, list):
        return column_means(found) if isinstance(found[0], list) else stats(found)
    if is_runs(found):
        rate = [best(found)[0], vertex(found)]
        return [*rate, *stats(best(found)[1]), *rate]
    return [x for key, part in found.items() for x in [*map(float, numbers(key)), *flat(part)]]


def is_runs(found):
    return all(re.fullmatch(r"[\d.e-]+", key) and isinstance(found[key], list) for key in found)


def by_label(found):
    return {label: flat({label: part}) for label, part in found.items()}


# The lists of each measured table, by the first cell of the row or in any order


def learning_rates():
    for rates in zip(*(stored("learning_rate")[m].items() for m in ("lora", "full")), strict=True):
        yield [x for lr, found in rates for x in (float(lr), *column_means(found))]


def ranks():
    *rules, full = stored("scaling").values()
    return {"full": flat(full)} | {
        r: [float(r), *(x for rule in rules for x in flat(rule[r]))] for r in rules[0]
    }


def rates():
    groups = {}
    for key, run in stored("rates").items():
        groups.setdefault(key.rpartition(",")[0], {})[run["r"]] = run
    for key, group in groups.items():
        size = [*map(float, numbers(key)[:2]), next(iter(group.values()))["passes"]]
        vertices = [vertex(group[r]["runs"]) for r in sorted(group)]
        yield [*size, *vertices, *sorted(group), *(flat(group[8]["runs"]) if 8 in group else [])]


def frontier():
    texts = stored("frontier").values()
    for label in stored("frontier")["book"]:
        for windows in (1, 2, 4, 16):
            names = [f"{windows} windows, {epochs} epochs" for epochs in (1, 2, 3, 6)]
            found = [text[label][name] for text in texts for name in names if name in text[label]]
            row = [
                mean(run[key] for run in runs)
                for runs in found
                for key in ("perplexity", "seconds")
            ]
            yield [*map(float, numbers(label)), windows, *row]


def recipes():
    lists = {}
    for label, recipes in stored("recipes").items():
        row = [*map(float, numbers(label))]
        for runs in recipes.values():
            row += stats([run["perplexity"] for run in runs])
        slow, fast = (mean(run["seconds"] for run in runs) for runs in recipes.values())
        lists[label] = [*row, slow / fast]
    return lists


def methods():
    """Return the rates tried and the best rate. The base is measured by another experiment."""
    yield [stored("learning_rate")["base"]]
    for runs in stored("methods").values():
        yield [*map(float, runs), *flat(runs)]


def regularisation():
    for label, found in stored("regularisation").items():
        yield [*map(float, numbers(label)), *stats(found)]


def targets():
    return by_label(stored("targets"))


def variants():
    more = {"LoRA": stored("scaling")["alpha = 16: s = 16 / r"]["8"]}
    for label, runs in stored("variants").items():
        runs = more.get(label, {}) | runs
        yield [*flat(runs), *(found[0] for found in runs.values())]


def rate_ratios():
    *rules, full = stored("scaling").values()
    for rule in rules:
        yield [vertex(runs) / vertex(full) for runs in rule.values()]
    for runs in stored("targets").values():
        yield [vertex(runs) / vertex(full)]
    for sizes in stored("regret").values():
        for size, runs in sizes["r = 8"].items():
            whole = sizes["full"][size]
            yield [vertex(runs.get("validation", runs)) / vertex(whole.get("validation", whole))]
    found = stored("methods")
    for name in found:
        yield [vertex(found[name]) / vertex(found["full: all weights"])]


def gaps_by_batch():
    full, *lora = stored("regret")["by batch"].values()
    windows = 240 * min(map(int, full))
    for batch in full:
        row = [int(batch), windows / int(batch), *stats(best(full[batch])[1])]
        for runs in lora:
            row += [*stats(best(runs[batch])[1]), gap(runs[batch], full[batch])]
        yield row


def gaps_by_share():
    full, *lora = stored("regret")["by share"].values()
    for share, whole in full.items():
        yield [mean(best(runs[share]["training"])[1]) for runs in (full, *lora)]
        found = [runs[share]["validation"] for runs in (full, *lora)]
        yield [x for runs in found for x in (mean(best(runs)[1]), gap(runs, whole["validation"]))]


def intruders():
    for seeds in stored("intruders").values():
        trained = column_means([seed["scores"] for seed in seeds])
        less = {
            x: column_means([s["change scaled"][x] for s in seeds])
            for x in seeds[0]["change scaled"]
        }
        row = [*(seed["intruders"] for seed in seeds), *trained]
        if all(seed["intruders scaled"] for seed in seeds):
            shrunk = column_means([seed["intruders scaled"]["0.75"] for seed in seeds])
            row += [*shrunk, *kl_at(shrunk[0], [trained, *less.values()])]
        yield [*row, *less["0.9"]]


def kl_at(perplexity, curve):
    """Return the KL at this perplexity right of the least, on lines between [perplexity, KL]."""
    curve = curve[curve.index(min(curve)) :]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= perplexity <= x1:
            return [y0 + (y1 - y0) * (perplexity - x0) / (x1 - x0)]
    return []


def smollm2():
    for label, rates in stored("smollm2").items():
        if label.startswith("base"):
            yield [rates["perplexity"], 0]
            continue
        runs = {float(lr): [seed[0]["perplexity"] for seed in seeds] for lr, seeds in rates.items()}
        lr, perplexities = best(runs)
        # The search has both neighbours, and with seed 0 both are worse.
        assert min(runs, key=lambda other: runs[other][0]) == lr
        assert {lr / 2, lr * 2} <= runs.keys()
        [seeds] = [seeds for other, seeds in rates.items() if float(other) == lr]
        yield [lr, *perplexities, *(seed[0]["kl"] for seed in seeds)]


def initialisation():
    for runs in stored("initialisation")["runs"].values():
        first = [mean(run[what][0] for run in runs) for what in ("loss", "A", "B")]
        yield [*first, *stats([run["loss"][-1] for run in runs])]


def first_step():
    mini, gpt2 = stored("first_step").values()
    for label, found in mini.items():
        moved = [model[label].get("h.0.attn.c_attn", 1) for model in (mini, gpt2)]
        yield [*map(float, numbers(label)), *moved, found["gain"]]


def choices():
    names = ("c_attn, c_proj, c_fc: r = 5", "c_attn: r = 20")
    yield [mean(best(stored("targets")[name])[1]) for name in names]
    rank_8 = stored("frontier")["book"]["LoRA, r = 8"]
    found = [
        rank_8[name][0]["perplexity"]
        for name in ("2 windows, 3 epochs", "16 windows, 3 epochs", "2 windows, 6 epochs")
    ]
    yield [2, 3, found[0], 2, found[1], 16, found[2], 6]
    fixed, growing, *_ = stored("scaling").values()
    yield [
        x for r, runs in fixed.items() for x in (mean(best(runs)[1]), int(r), mean(best(runs)[1]))
    ]
    yield [
        1,
        64,
        vertex(fixed["64"]) / vertex(fixed["1"]),
        16,
        vertex(growing["1"]) / vertex(growing["64"]),
    ]
    runs = [*stored("rates").values()]
    off = [
        math.log(vertex(r["runs"]) * (r["steps"] * r["passes"] ** 2) ** (1 / 3) / 0.035)
        for r in runs
    ]
    misses = [math.exp(mean(x * x for x in off) ** 0.5), math.exp(max(map(abs, off)))]
    small = stored("smollm2")
    rates = [
        min(small[name], key=lambda lr, name=name: small[name][lr][0][0]["perplexity"])
        for name in ("LoRA", "LoRA, book")
    ]
    yield [len(runs), *misses, *(float(lr) / 8e-3 for lr in rates)]


def quantised():
    data = stored("quantisation")
    for kind, runs in data["losses"].items():
        error = 100 * mean(data["error by layer"].get(kind, {"": 0}).values())
        found = [stats([run[what] for run in runs]) for what in runs[0]]
        yield [error, *found[0], *found[1]]
        yield from found  # of an adapter on NF4 also the losses after merging


def quantised_memory():
    found = stored("quantised_memory")
    for name in found:
        pair = [found[other] for other in (name, f"{name}, checkpointing") if other in found]
        seconds = [median(run["seconds"]) / median(found["bf16"]["seconds"]) for run in pair]
        yield [*(run["peak_mb"] / 1e3 for run in pair), *seconds]


def other_model():
    for rates in stored("other_model").values():
        yield [next(iter(rates.values()))[0]["base"]]
        for lr, seeds in rates.items():
            yield [float(lr), *stats([min(seed["trained"]) for seed in seeds])]


def bytes_counted():
    sides = [[x / 1e6 for x in side["predicted"].values()] for side in stored("memory").values()]
    yield from zip(*sides, strict=True)
    yield [*map(sum, sides)]


def race():
    sides = {}
    for one in benchmark("speed")["measurements"]:
        name = f"{one['method'].replace('lora', 'LoRA')}, {one['precision']}"
        for key in ("median", "peak_mb"):
            sides.setdefault(name, {}).setdefault((one["side"], key), []).append(one[key])
    for found in sides.values():
        found["memory"] = ratios(found["ours", "peak_mb"], found["theirs", "peak_mb"])
        for side in ("theirs", "alike"):
            found[side] = ratios(found[side, "median"], found["ours", "median"])
    columns = (("ours", "median"), "theirs", "alike", ("ours", "peak_mb"), "memory")
    return {
        name: [x for column in columns for x in stats(found[column], median)]
        for name, found in sides.items()
    }


def ratios(over, under):
    return [a / b for a, b in zip(over, under, strict=True)]


def reference_runs():
    for name in ("pseudo-latin", "three-passes", "next-token", "english"):
        found = benchmark(f"reference-{name}")["here"]
        measured = [
            found[m][loss]["perplexity"] for loss in ("reference", "next_token") for m in found
        ]
        yield [found["lora"]["steps"], *measured]
