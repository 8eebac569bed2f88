"""Parts of sentences that repeat numbers of a table, for each page that must have them."""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.speed import spread
from lesson.experiments.rates import fit, vertex
from lesson.experiments.texts import FITTED
from lesson.tables.experiments import ladder
from lesson.tables.others import least
from lesson.tables.stored import at_best, benchmark, results


def readme() -> Iterator[str]:
    seeds = results("other_model")["conversations"]["searched"]
    yield f"fell from {seeds[0]['base']:.1f} to {mean(least(seeds)):.1f} (mean of [three runs]"
    three = [text["3"] for text in results("texts").values() if "reference" in text["3"]]
    yield f"than the default settings on [{count_below(three)} of {len(three)} texts]"
    yield f"({above_reference(three)} higher on the other)"


def count_below(compared: list[dict[str, Any]]) -> int:
    """Count the results where `best` has a lower perplexity than `reference`."""
    return sum(row["best"] < row["reference"] for row in compared)


def above_reference(compared: list[dict[str, Any]]) -> str:
    """Print how far `best` is above `reference`, for each result where it is not below."""
    ratios = [row["best"] / row["reference"] for row in compared]
    return " and ".join(f"{100 * (x - 1):.1f} %" for x in ratios if x >= 1)


def experiments() -> Iterator[str]:
    yield f"The base has a perplexity of {results('learning_rate')['base']:.1f}."
    _, steps, passes, _ = fit(results("rates"))
    yield f"a fit gives {steps:.2f} for steps and {passes:.2f} for passes"
    yield f"The rule misses the {misses()} at worst."
    texts = results("texts")
    worst = max(above(row) for name in texts.keys() - FITTED for row in rows(texts[name]))
    yield f"it ends at most {worst:.1f} % above the lowest perplexity of a *ladder*"
    both = [row for text in texts.values() for row in rows(text) if "reference" in row]
    yield f"in {count_below(both)} of {len(both)} comparisons a lower one than `--recipe reference`"
    yield f"{above_reference(both)} higher"
    count = sum(len(rows(text)) for text in texts.values())
    yield f"of the {count} results of `best` are more than"
    yield f"the means over three seeds are {above_the_ladder()} above the ladder."
    means = [mean(found) for found in results("regularisation").values()]
    yield f"are between {min(means):.1f} and {max(means):.1f}"


def rows(text: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results on a text, for each number of epochs that ran."""
    return [text[epochs] for epochs in ("1", "3", "10") if epochs in text]


def above(row: dict[str, Any]) -> float:
    """Return how far `best` is above the ladder's best rate, in %, over the seeds that ran."""
    best = mean([row["best"], *row.get("best again", [])])
    return 100 * (best / mean([ladder(row), *row.get("ladder again", [])]) - 1)


def above_the_ladder() -> str:
    """Print how far the repeated rows are above the ladder's best rate."""
    found = [
        f"{above(row):.1f} %"
        for text in results("texts").values()
        for row in rows(text)
        if "best again" in row
    ]
    return f"{', '.join(found[:-1])} and {found[-1]}"


def misses() -> str:
    """Print the factors between the rule and the best rates."""
    runs = results("rates").values()
    factors = [
        vertex(run["runs"]) * (run["steps"] * run["passes"] ** 2) ** (1 / 3) / 0.035 for run in runs
    ]
    off = np.abs(np.log(factors))
    middle = math.exp(np.sqrt(np.square(off).mean()))
    return (
        f"{len(runs)} best rates of the figure by a factor of {middle:.1f} (root mean square), and "
        f"by {math.exp(off.max()):.0f}"
    )


def findings() -> Iterator[str]:
    fixed, _, _, full = results("scaling").values()
    attention = vertex(results("targets")["c_attn: r = 20"]) / vertex(full)
    yield f"In part: {vertex(fixed['1']) / vertex(full):.0f} to {attention:.0f} times with alpha 16"
    yield f"the best rate {rises_and_falls(' but')}"
    by_size: dict[str, list[float]] = {}
    for name, run in results("rates").items():
        by_size.setdefault(name.rpartition(",")[0], []).append(vertex(run["runs"]))
    rises = [rates[-1] / rates[0] for rates in by_size.values() if len(rates) == 3]
    yield f"it rises by a factor of {min(rises):.1f} to {max(rises):.1f}"


def rises_and_falls(word: str) -> str:
    """Print how the best rate changes from rank 1 to rank 64."""
    fixed, growing, *_ = results("scaling").values()
    rises = vertex(fixed["64"]) / vertex(fixed["1"])
    falls = vertex(growing["1"]) / vertex(growing["64"])
    return (
        f"rises by a factor of {rises:.1f} with alpha 16,{word} falls by a factor of {falls:.1f} "
        "with alpha twice the rank"
    )


def lora() -> Iterator[str]:
    layers = results("targets")
    all_four, attention = layers["c_attn, c_proj, c_fc: r = 5"], layers["c_attn: r = 20"]
    yield f"{at_best(all_four):.1f} with all four and {at_best(attention):.1f} with `c_attn` alone"
    fixed = next(iter(results("scaling").values()))
    yield "perplexity " + ", ".join(f"{at_best(runs):.1f} at rank {r}" for r, runs in fixed.items())
    rank_8 = results("frontier")["book"]["LoRA, r = 8"]
    names = ("2 windows, 3 epochs", "16 windows, 3 epochs", "2 windows, 6 epochs")
    small, large, long = (rank_8[name][0]["perplexity"] for name in names)
    yield f"{small:.1f} with batches of 2 windows, {large:.1f} with 16, and {long:.1f} with 2 for 6"
    yield f"the best rate {rises_and_falls(' and')}"


def variants() -> Iterator[str]:
    lora, *others = map(vertex, results("variants").values())
    factors = [runs / lora for runs in others]
    yield ("give {:.2f} for rsLoRA, {:.2f} for DoRA, {:.2f} for PiSSA and {:.2f} for LoRA+").format(
        *factors
    )
    dora, plain = (benchmark("variants")["results"][name] for name in ("DoRA", "plain"))
    yield f"takes {spread(dora['ratios'])} times as long"
    yield f"keeps {dora['kept_mb']:.0f} instead of {plain['kept_mb']:.0f} MB"


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "README.md": readme,
    "docs/experiments.md": experiments,
    "docs/findings.md": findings,
    "docs/lora.md": lora,
    "docs/variants.md": variants,
}


def parts(page: str) -> Sequence[str]:
    """Return the parts of sentences that a page must have."""
    if page not in PARTS:
        return []
    return [*PARTS[page]()]


def missing(page: str, text: str) -> Sequence[str]:
    """Return the parts of sentences that a page lacks."""
    words = " ".join(text.split())
    return [part for part in parts(page) if part not in words]
