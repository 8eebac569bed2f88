"""The tables of README.md and docs/experiments.md."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from lesson.experiments.rates import vertex
from lesson.experiments.sweep import best_rate
from lesson.experiments.texts import FITTED
from lesson.tables.stored import at_best, means, range_at_best, rate, results, table


@table
def outcome() -> Iterator[str]:
    cells = {name: rate_and_perplexity(runs) for name, runs in results("methods").items()}
    layers = "LoRA on all four layers of each block"
    why = "([why](docs/experiments.md#the-recipe-on-other-texts))"
    best_row = f"| **`make train-lora RECIPE=best`**: {layers} {why} | 196,608 | 2, 249"
    yield (
        "| on `mini`, 6.9 million parameters | trained parameters | batch size, steps "
        "| peak learning rate | perplexity |"
    )
    yield "|---|---:|---|---:|---:|"
    yield f"| the base | | | | {results('learning_rate')['base']:.1f} |"
    yield f"| `make train-lora`: LoRA on `c_attn` | 49,152 | 16, 249 | {cells['make train-lora']} |"
    yield (
        f"| `make train-full`: full fine-tuning | 6,901,760 | 64, 63 | {cells['make train-full']} |"
    )
    best = results("texts")["the book"]["3"]
    yield f"{best_row} | {rate(best['lr'])} | {best['best']:.1f} |"
    yield (
        "| full fine-tuning with the recipe's batches, at the best of the rates tried "
        f"| 6,901,760 | 2, 249 | {cells['full: all weights']} |"
    )


def rate_and_perplexity(runs: Any) -> str:
    return f"{rate(best_rate(runs))} | {at_best(runs):.1f}"


def rate_and_spread(runs: Any) -> str:
    return f"{rate(best_rate(runs))} | {range_at_best(runs)}"


@table
def learning_rates() -> Iterator[str]:
    yield "| peak lr | LoRA: perplexity | KL | | peak lr | full: perplexity | KL |"
    yield "|---|---:|---:|---|---|---:|---:|"
    sides = []
    for method in ("lora", "full"):
        rows = {lr: means(seeds) for lr, seeds in results("learning_rate")[method].items()}
        least = min(perplexity for perplexity, _ in rows.values())
        sides.append(
            [f"{rate(lr)} | {bold(x, x == least)} | {kl:.2f}" for lr, (x, kl) in rows.items()]
        )
    for lora, full in zip(*sides, strict=True):
        yield f"| {lora} | | {full} |"


def bold(perplexity: float, least: bool) -> str:
    stars = "**" * least
    return f"{stars}{perplexity:.1f}{stars}"


@table
def ranks() -> Iterator[str]:
    *rules, full = results("scaling").values()
    yield (
        "| r | alpha = 16: s = 16 / r | rate | alpha = 2 r: s = 2 | rate "
        "| rsLoRA: s = 5.66 / √r | rate |"
    )
    yield "|---:|---|---|---|---|---|---|"
    for r in ("1", "8", "64"):
        cells = [perplexity_and_rate(rule[r]) for rule in rules]
        if r == "8":
            cells[1:] = ["the same |", "the same |"]
        yield f"| {r} | {' | '.join(cells)} |"
    yield f"| full | {perplexity_and_rate(full)} | | | | |"


def perplexity_and_rate(runs: Any) -> str:
    return f"{range_at_best(runs)} | {rate(vertex(runs))}"


@table
def rank_8() -> Iterator[str]:
    """Relate the numbers of one adapter on all pages: rank 8, all four layers, the book."""
    best = results("texts")["the book"]["3"]
    tuned = results("methods")["LoRA, all four layers of a block"]
    short = next(iter(results("scaling").values()))["8"]
    five = results("targets")["c_attn, c_proj, c_fc: r = 5"]
    long = "249 steps of 2 windows"
    yield "| rank 8 on all four layers | peak rate | perplexity |"
    yield "|---|---:|---|"
    yield f"| {long}: `--recipe best`, seed 42 | {rate(best['lr'])} | {best['best']:.1f} |"
    yield f"| {long}, the best of three rates | {rate_and_spread(tuned)} |"
    yield f"| 60 steps of 4 windows | {rate_and_spread(short)} |"
    yield f"| 60 steps of 4 windows, rank 5 | {rate_and_spread(five)} |"


@table
def texts() -> Iterator[str]:
    yield (
        "| text | size | base | 1 epoch: reference | best | ladder "
        "| 3 epochs: reference | best | ladder | 10 epochs: reference | best | ladder |"
    )
    yield "|---|---:|---:|" + "---:|" * 9
    for name, found in results("texts").items():
        mark = " (fitted)" if name in FITTED else ""
        cells = [f"{found['bytes'] / 1000:.0f} KB", perplexity(found["1"]["base"])]
        for epochs in ("1", "3", "10"):
            ways = ("reference", "best", "ladder")
            cells += [one_way(found.get(epochs, {}), way) for way in ways]
        yield f"| {name.partition(',')[0]}{mark} | {' | '.join(cells)} |"


def one_way(found: dict[str, Any], way: str) -> str:
    """Print the perplexity of one way to choose the rate, if it was measured."""
    if way not in found:
        return ""
    return perplexity(ladder(found) if way == "ladder" else found[way])


def ladder(found: dict[str, Any]) -> float:
    """Return the lowest perplexity of the ladder."""
    return min(found["ladder"].values())


def perplexity(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rows_of_ways() -> list[dict[str, Any]]:
    """Return the results on texts that were not fitted, with one and with three epochs."""
    return [
        row
        for name, found in results("texts").items()
        if name not in FITTED
        for epochs, row in found.items()
        if epochs in ("1", "3")
    ]


def not_below_base(way: str) -> int:
    """Count these results where a way to choose the rate does not beat the base."""
    return sum(row[way] >= row["base"] for row in rows_of_ways())


@table
def ways() -> Iterator[str]:
    yield (
        "| the peak rate | cost | not below the base | above the best of the ladder: worst "
        "| median |"
    )
    yield "|---|---|---:|---:|---:|"
    rows = rows_of_ways()
    for way, label, cost in (
        ("fixed", "4e-3", "none"),
        ("rule", "the rule, at most 8e-3", "none"),
        ("best", "the search (`--recipe best`)", "runs of 24 steps"),
    ):
        above = [100 * (row[way] / ladder(row) - 1) for row in rows]
        spread_ = f"{max(above):.1f} % | {median(above):.1f} %"
        yield f"| {label} | {cost} | {not_below_base(way)} of {len(rows)} | {spread_} |"


@table
def targets() -> Iterator[str]:
    yield "| layers | r | best rate | perplexity |"
    yield "|---|---:|---:|---:|"
    for label, runs in results("targets").items():
        layers, r = label.split(": r = ")
        names = ", ".join(f"`{name}`" for name in layers.split(", "))
        if layers == "c_attn, c_proj, c_fc":
            names += " (all four)"
        yield f"| {names} | {r} | {rate_and_spread(runs)} |"


@table
def variants() -> Iterator[str]:
    differs = {
        "LoRA": "| 196,608",
        "rsLoRA": "s = 5.66, not 2 | 196,608",
        "DoRA": "trains row lengths separately | 210,432",
        "PiSSA": "starts from W's singular vectors | 196,608",
    }
    low = {name: runs.get("0.001") for name, runs in results("variants").items()}
    low["LoRA"] = results("scaling")["alpha = 16: s = 16 / r"]["8"]["0.001"]
    yield (
        "| variant | what differs | parameters trained | best rate | perplexity | at 1e-3, seed 0 |"
    )
    yield "|---|---|---:|---:|---:|---:|"
    for name, runs in results("variants").items():
        last = "|"
        if low[name]:
            last = f"{low[name][0]:.1f} |"
        yield f"| {name.partition(',')[0]} | {differs[name]} | {rate_and_spread(runs)} | {last}"


@table
def methods() -> Iterator[str]:
    yield "| trained | trained numbers | best rate | perplexity |"
    yield "|---|---:|---:|---:|"
    for name, count in (
        ("LoRA, all four layers of a block", "196,608"),
        ("the four layers' weights alone", "4,718,592"),
        ("full: all weights", "6,901,760"),
    ):
        label = name.replace("LoRA,", "LoRA, r = 8,")
        yield f"| {label} | {count} | {rate_and_spread(results('methods')[name])} |"
