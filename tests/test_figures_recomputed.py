"""Recompute the tables of two pages from docs/figures, without lesson/."""

import json
import math
import re
from pathlib import Path
from statistics import mean

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("experiments", "findings")
TEXT = "".join((DOCS / f"{page}.md").read_text() for page in PAGES)
ROWS = [
    [cell.strip() for cell in re.sub(r"[*`]", "", line).strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|")
]


def stored(name):
    return json.loads((DOCS / "figures" / f"{name}.json").read_text())["results"]


def is_printed(*cells):
    """Return whether a table row contains these cells in sequence."""
    return any(row[i : i + len(cells)] == list(cells) for row in ROWS for i in range(len(row)))


def best(runs):
    """Return the best rate and its results, among the rates with every seed."""
    most = max(map(len, runs.values()))
    means = {lr: mean(found) for lr, found in runs.items() if len(found) == most}
    lr = min(means, key=means.__getitem__)
    return float(lr), runs[lr]


def vertex(runs):
    """Return the minimum of the parabola through the best rate and its neighbours."""
    lr, _ = best(runs)
    y = {float(other): math.log(mean(found)) for other, found in runs.items()}
    low, middle, high = y[lr / 2], y[lr], y[lr * 2]
    return lr * 2 ** ((low - high) / (2 * (low - 2 * middle + high)))


def spread(runs):
    return mean_and_range(best(runs)[1])


def mean_and_range(found):
    if len(found) == 1:
        return f"{found[0]:.1f}"
    return f"{mean(found):.1f} ({min(found):.1f} .. {max(found):.1f})"


def rate(lr):
    return f"{lr:.1e}".replace("e-0", "e-").replace(".0e", "e")


def gap(runs, full):
    return f"{math.log(mean(best(runs)[1]) / mean(best(full)[1])):.2f}"


def test_learning_rates_and_ranks():
    for method in ("lora", "full"):
        for lr, found in stored("learning_rate")[method].items():
            perplexity, kl = (mean(x) for x in zip(*found, strict=True))
            assert is_printed(rate(float(lr)), f"{perplexity:.1f}", f"{kl:.2f}")
    *rules, full = stored("scaling").values()
    assert is_printed("full", spread(full), rate(vertex(full)))
    for r in ("1", "64"):
        both = [(spread(rule[r]), rate(vertex(rule[r]))) for rule in rules]
        assert is_printed(r, *(cell for pair in both for cell in pair))
    ratios = [[round(vertex(runs) / vertex(full), 1) for runs in rule.values()] for rule in rules]
    assert ratios[:2] == [[7.2, 10.1, 10.8], [19.8, 10.1, 3.5]]  # rounded on the page


def test_the_rule_for_the_rate():
    off = []
    for run in stored("rates").values():
        off.append(vertex(run["runs"]) / (0.035 / (run["steps"] * run["passes"] ** 2) ** (1 / 3)))
        assert rate(vertex(run["runs"])) in TEXT
    assert round(math.exp(math.sqrt(mean(math.log(x) ** 2 for x in off))), 1) == 1.3


def test_layers_variants_and_intruders():
    for figure in ("targets", "variants", "alone"):
        for runs in stored(figure).values():
            assert is_printed(rate(best(runs)[0]), spread(runs))
    for seeds in stored("intruders").values():
        perplexity, kl = (mean(x) for x in zip(*(s["scores"] for s in seeds), strict=True))
        counts = ", ".join(str(seed["intruders"]) for seed in seeds)
        assert is_printed(counts, f"{perplexity:.1f}, {kl:.3f}")


def test_gaps_to_full_fine_tuning():
    full, *lora = stored("regret")["by batch"].values()
    for batch in ("2", "8", "32"):
        gaps = [(spread(runs[batch]), gap(runs[batch], full[batch])) for runs in lora]
        assert is_printed(spread(full[batch]), *(cell for pair in gaps for cell in pair))
    full, *lora = stored("regret")["by share"].values()
    for share in ("64", "256", "1024"):
        base = full[share]["validation"]
        found = [runs[share]["validation"] for runs in lora]
        gaps = [f"{mean(best(runs)[1]):.1f} ({gap(runs, base)})" for runs in found]
        assert is_printed(f"{mean(best(base)[1]):.1f}", *gaps)


def test_the_best_recipe_is_never_worse_than_the_reference():
    for label, recipes in stored("recipes").items():
        reference, best = ([run["perplexity"] for run in found] for found in recipes.values())
        assert max(best) < min(reference) - 4.3, label
        slow, fast = (mean(run["seconds"] for run in found) for found in recipes.values())
        times = f"{slow / fast:.1f}"
        assert is_printed(label, mean_and_range(reference), mean_and_range(best), times), label


def test_the_frontier():
    book, instructions = stored("frontier").values()
    for label in book:
        for windows in (1, 2, 4, 16):
            names = [f"{windows} windows, {epochs} epochs" for epochs in (1, 2, 3, 6)]
            runs = [text[label].get(name) for text in (book, instructions) for name in names]
            cells = [f"{r[0]['perplexity']:.1f} ({r[0]['seconds']:.0f})" if r else "" for r in runs]
            assert not any(cells) or is_printed(label, str(windows), *cells)


def test_smollm2():
    data = stored("smollm2")
    for task in ("instructions", "book"):
        assert is_printed("nothing", "", f"{data.pop(f'base, {task}')['perplexity']:.1f}", "0")
    for runs in data.values():
        most = max(map(len, runs.values()))
        found = {
            lr: [seed[0] for seed in seeds] for lr, seeds in runs.items() if len(seeds) == most
        }
        lr = min(found, key=lambda lr: mean(seed["perplexity"] for seed in found[lr]))
        perplexities = ", ".join(f"{seed['perplexity']:.1f}" for seed in found[lr])
        kls = ", ".join(f"{seed['kl']:.2f}" for seed in found[lr])
        assert is_printed(rate(float(lr)), perplexities, kls)
        # The search has both neighbours, and with seed 0 both are worse.
        first = {float(lr): seeds[0][0]["perplexity"] for lr, seeds in runs.items()}
        assert min(first, key=first.__getitem__) == float(lr)
        assert {float(lr) / 2, float(lr) * 2} <= first.keys()
    lora, full = data["LoRA"]["0.004"], data["full"]["0.0002"]
    half = data["LoRA"]["0.002"][0][0], data["full"]["0.0001"][0][0]
    numbers = [f"{x:.{n}f}" for run in half for x, n in ((run["perplexity"], 1), (run["kl"], 2))]
    text = " ".join(TEXT.split())
    assert "{} and a KL of {}, and full fine-tuning has {} and {}".format(*numbers) in text
    shrunk = [
        ", ".join(f"{seed[1][key]:.{digits}f}" for seed in seeds)
        for seeds in (lora, full)
        for key, digits in (("perplexity", 1), ("kl", 2))
    ]
    printed = (
        "LoRA has perplexities of {} and KLs of {} (seeds 0, 1 and 2), and full fine-tuning has"
    )
    assert f"{printed.format(*shrunk)} {shrunk[2]} and {shrunk[3]}" in text
