"""Parts of sentences that repeat numbers of a table, for each page that must have them."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.speed import figures, spread
from lesson.experiments.rates import fit, vertex
from lesson.experiments.texts import FITTED
from lesson.tables.experiments import ladder, not_below_base, rows_of_ways
from lesson.tables.others import least
from lesson.tables.stored import at_best, benchmark, gap, means, rate, results

WORDS = ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")


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
    rates = [float(min(row["ladder"], key=row["ladder"].__getitem__)) for row in rows_of_ways()]
    yield f"the best rate of the ladder is between {rate(min(rates))} and {rate(max(rates))}"
    yield f"it ends at most {worst:.1f} % above the lowest perplexity of a *ladder*"
    both = [row for text in texts.values() for row in rows(text) if "reference" in row]
    yield f"in {count_below(both)} of {len(both)} comparisons a lower one than `--recipe reference`"
    yield f"{above_reference(both)} higher"
    count = sum(len(rows(text)) for text in texts.values())
    repeated = above_the_ladder()
    yield (
        f"**{WORDS[len(repeated)]} of the {count} results of `best` are more than 2 % above the "
        "ladder"
    )
    means_above = f"{', '.join(repeated[:-1])} and {repeated[-1]}"
    yield f"the means over three seeds are {means_above} above the ladder."
    yield f"{WORDS[not_below_base('fixed')].lower()} runs never improve on the base"
    layers = {name.partition(":")[0]: at_best(runs) for name, runs in results("targets").items()}
    attention = [layers[name] for name in ("c_attn", "attn.c_proj")]
    mlp = [layers[name] for name in ("c_fc", "mlp.c_proj", "c_fc, mlp.c_proj")]
    low, high = min(attention) - max(mlp), max(attention) - min(mlp)
    yield f"has a perplexity {low:.0f} to {high:.0f} lower than on one attention layer"
    settings = [mean(found) for found in results("regularisation").values()]
    yield f"are between {min(settings):.1f} and {max(settings):.1f}"
    runs = results("learning_rate")
    _, lora_kl = means(runs["lora"]["0.003"])
    _, full_kl = means(runs["full"]["3e-05"])
    yield f"the KL is {lora_kl:.2f} against {full_kl:.2f}"
    _, growing, *_ = results("scaling").values()
    yield f"gives rank 64 a perplexity of {growing['64']['0.008'][0]:.0f}"
    yield from frontier()


def frontier() -> Iterator[str]:
    gains = []  # of a small batch over 16 windows, in perplexity
    longest = []  # seconds of a small batch over the seconds of 16 windows, on each text
    thirds = []  # gain of the third epoch, in perplexity
    for text in results("frontier").values():
        rank_8 = {name: runs[0] for name, runs in text["LoRA, r = 8"].items()}
        slower = []
        for size, n in product((1, 2), (1, 2, 3, 6)):
            small, large = (rank_8[f"{windows} windows, {n} epochs"] for windows in (size, 16))
            gains.append(large["perplexity"] - small["perplexity"])
            slower.append(small["seconds"] / large["seconds"])
        longest.append(max(slower))
        for size in (1, 2, 4):
            two, three = (rank_8[f"{size} windows, {n} epochs"]["perplexity"] for n in (2, 3))
            thirds.append(two - three)
    yield f"has a perplexity {min(gains):.1f} to {max(gains):.1f} lower than with batches of 16"
    book, examples = longest
    yield f"to {book:.1f} times as long on the book, and up to {examples:.1f} times as long on the"
    low, high = min(thirds), max(thirds)
    yield f"three epochs give a perplexity {low:.1f} to {high:.1f} lower than two epochs"


def rows(text: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results on a text, for each number of epochs that ran."""
    return [text[epochs] for epochs in ("1", "3", "10") if epochs in text]


def above(row: dict[str, Any]) -> float:
    """Return how far `best` is above the ladder's best rate, in %, over the seeds that ran."""
    best = mean([row["best"], *row.get("best again", [])])
    return 100 * (best / mean([ladder(row), *row.get("ladder again", [])]) - 1)


def above_the_ladder() -> list[str]:
    """Print how far each of the repeated rows is above the ladder's best rate."""
    return [
        f"{above(row):.1f} %"
        for text in results("texts").values()
        for row in rows(text)
        if "best again" in row
    ]


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
    rank_1 = vertex(fixed["1"]) / vertex(full)
    for start in ("in", "In"):  # in the table of findings, and below
        yield f"{start} part: {rank_1:.0f} to {attention:.0f} times with alpha 16"
    yield f"the best rate {rises_and_falls(' but')}"
    by_size: dict[str, list[float]] = {}
    for name, run in results("rates").items():
        by_size.setdefault(name.rpartition(",")[0], []).append(vertex(run["runs"]))
    rises = [rates[-1] / rates[0] for rates in by_size.values() if len(rates) == 3]
    yield f"it rises by a factor of {min(rises):.1f} to {max(rises):.1f}"
    tuned = results("methods")
    lag = gap(tuned["the four layers' weights alone"], tuned["full: all weights"])
    yield f"training all weights gives a loss {lag:.2f} nats lower"
    alike = ("full, an eighth of the rate", "r = 8, half the rate")
    scores = [means([seed["scores"] for seed in results("intruders")[name]]) for name in alike]
    (full_perplexity, full_kl), (lora_perplexity, lora_kl) = scores
    yield (
        f"nearly the same perplexity ({full_perplexity:.1f} and {lora_perplexity:.1f}), but LoRA "
        f"forgets {lora_kl / full_kl:.1f} times as much"
    )
    yield from amplification()
    lora = results("smollm2")["LoRA"]
    high, best = (lora[lr][0][0]["perplexity"] for lr in ("0.008", "0.004"))
    yield f"gives a perplexity {high - best:.1f} higher than the best rate (rank 8, seed 0)"


def amplification() -> Iterator[str]:
    by_rank = [
        [run for runs in layers.values() for run in runs]
        for name, layers in results("amplification").items()
        if name != "full"
    ]
    rank_1, rank_8, _ = ([run["amplification"] for run in runs] for runs in by_rank)
    yield f"the factor is {min(rank_1):.0f} to {max(rank_1):.0f} at rank 1"
    yield f"{min(rank_8):.1f} to {max(rank_8):.1f} at rank 8"
    own = max(run["to its own"] for runs in by_rank for run in runs)
    yield f"it is at most {own:.2f} times as large as in the leading"


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


def lora_in_depth() -> Iterator[str]:
    changes = results("spectrum")
    attention, mlp = (changes[f"{name}: full"] for name in ("c_attn", "mlp.c_proj"))
    shares = [100 * mean(seed[7] for seed in seeds) for seeds in (attention, mlp)]
    yield f"contain {shares[0]:.0f} % of the squared norm for `c_attn`, and {shares[1]:.0f} % for"
    uncut, at_8, at_0 = (mean(changes["cut"][k]) for k in ("256", "8", "0"))
    yield f"{uncut:.1f} uncut, {at_8:.1f} at $k = 8$, and {at_0:.1f} at $k = 0$. Even {at_0:.1f} is"
    pairs = ("full and full", "LoRA and full", "LoRA and LoRA")
    overlaps = [mean(pair[7] for pair in changes[name]) for name in pairs]
    yield (
        "is {:.2f} between two full fine-tunings, {:.2f} between LoRA and full fine-tuning, and "
        "{:.2f} between two LoRA runs"
    ).format(*overlaps)
    merged = results("merge_error")
    hundredth, thousandth = (merged["size"].index(size) for size in (0.01, 0.001))
    fp16, bf16 = (merged[name]["error"] for name in ("fp16", "bf16"))
    unmoved = merged["bf16"]["unmoved"][hundredth]
    yield (
        f"{100 * fp16[hundredth]:.0f} % of the update's norm in fp16 and "
        f"{100 * bf16[hundredth]:.0f} % in bf16. Also, {100 * unmoved:.0f} % of the bf16 weights"
    )
    yield f"is {100 * fp16[thousandth]:.0f} % in fp16 and {100 * bf16[thousandth]:.0f} % in bf16."
    sizes = merged["adapter"]
    yield f"the updates have {min(sizes):.2f} to {max(sizes):.2f} times the size"


def qlora() -> Iterator[str]:
    book = results("other_model")["book, NF4"]
    yield f"on the NF4 base: the perplexity is {min(book['trained']):.1f}"
    yield f"There, the perplexity is {book['in PEFT']:.1f}."
    found = results("quantisation")
    even = dict(zip(found["block sizes"], found["error by block size"]["even levels"], strict=True))
    yield f"{100 * even[64]:.1f} % with blocks of 64 weights, and {100 * even[4096]:.1f} % with"
    memory = results("quantised_memory")
    nf4, int8, bf16, both = (
        mean(memory[name]["seconds"]) for name in ("nf4", "int8", "bf16", "nf4, checkpointing")
    )
    yield f"took {nf4:.1f} CPU seconds with NF4, {int8:.1f} with int8 and {bf16:.1f} with bf16"
    yield f"checkpointing, a step took {both:.1f} CPU seconds"
    seeds = found["losses"]["nf4"]
    exact = found["losses"]["fp32"]
    for what, name in (("of the base by only", "base"), ("after training by", "trained")):
        raised = mean(run[name] for run in seeds) - mean(run[name] for run in exact)
        yield f"raises the loss {what} {raised:.3f} nats"
    moved = max(abs(run["into the original base"] - run["trained"]) for run in seeds)
    yield f"the loss moves by {moved:.4f} nats at most"
    yield f"costs {mean(run['into NF4 again'] - run['trained'] for run in seeds):.3f} nats"


def real_weights() -> Iterator[str]:
    found = results("other_model")["conversations"]
    seed_0 = found["searched"][0]
    rates = {run["lr"]: run for run in found["other rates"].values()}
    runs = [seed_0, rates[seed_0["lr"] / 2], rates[seed_0["lr"] * 2]]
    searched, half, twice = least(runs)
    yield (
        f"half of it lowers the perplexity by {100 * (1 - half / searched):.0f} %, and twice this "
        f"rate raises it by {100 * (twice / searched - 1):.0f} % (seed 0)"
    )


def reference_run() -> Iterator[str]:
    yield f"{100 * benchmark('reference-pseudo-latin')['seen_before']:.0f} % of its sequences of 16"
    english = benchmark("reference-english")["here"]["lora"]["reference"]["perplexity"]
    yield f"LoRA's perplexity is {english:.0f} (last row)"


def training() -> Iterator[str]:
    errors = []
    for method in results("memory").values():
        measured, counted = (sum(method[name].values()) for name in ("measured", "predicted"))
        errors.append(100 * abs(counted / measured - 1))
    yield f"The count is within {math.ceil(max(errors))} % of the measurement"


def speed() -> Iterator[str]:
    found = results("step_time")
    time = {name: sum(map(mean, shares.values())) for name, shares in found.items()}
    counted, timed = (time[f"{kind}: LoRA"] / time[f"{kind}: full"] for kind in ("by hand", "fp32"))
    yield f"the ratio is {counted:.2f} by count, but {timed:.2f} by time in fp32"
    thin = mean(found["fp32: LoRA"]["A and B"])
    yield f"but {100 * thin:.0f} % of its time"
    raced = figures(benchmark("speed")["measurements"])
    ratios = [*raced["LoRA, fp32"]["memory"], *raced["LoRA, bf16"]["memory"]]
    yield f"LoRA needs {min(ratios):.2f} to {max(ratios):.2f} of PEFT's memory"


def measures() -> Iterator[str]:
    yield f"`mini` has a perplexity of {results('learning_rate')['base']:.1f}"


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "README.md": readme,
    "docs/experiments.md": experiments,
    "docs/findings.md": findings,
    "docs/lora.md": lora,
    "docs/lora-in-depth.md": lora_in_depth,
    "docs/measures.md": measures,
    "docs/qlora.md": qlora,
    "docs/real-weights.md": real_weights,
    "docs/reference-run.md": reference_run,
    "docs/speed.md": speed,
    "docs/training.md": training,
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
