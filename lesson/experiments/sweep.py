"""Fine-tune mini many times, and compare choices, each choice at the best rate.

`finetune` keeps results in runs/experiments, and does not repeat a run with a known result.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from common.errors import RunError
from common.figures import BASE, FULL, LORA, scientific
from common.files import file_sha256
from lesson.experiments.common import (
    SEEDS,
    Steps,
    asked_options,
    describe_seeds,
    experiment,
    panels,
    settings,
    spread,
    trainer,
)
from storage.hub import find_base
from storage.weights import base_hashes
from training.options import MAY_CHANGE, ROOT, Options

# One result per line. Delete the file after a code change that affects results.
CELLS = ROOT / "runs" / "experiments" / "cells.jsonl"

# The key contains the options that a recipe sets, except the rate that `best` computes.
DECIDES_NOTHING = MAY_CHANGE | {"recipe"}

SIZE: dict[str, Any] = {"batch_size": 4, "stride": 128, "max_steps": 60, "epochs": 100}
ALL = ("c_attn", "c_proj", "c_fc")  # all four layers of a block: two are named c_proj

PLAIN = "LoRA"  # the choice with which variants are compared

Rate = TypeVar("Rate", float, str)  # a number, or text in a JSON file
# The result with each seed, by rate.
Runs = dict[float, list[Any]]
# A choice to compare: the first rate to try, and the choice's options.
Choice = tuple[float, dict[str, Any]]


def train(made: Steps) -> None:
    """Take every step."""
    for batch in made.batches():
        made.step(batch)


def perplexity(made: Steps) -> float:
    """Return the perplexity on the validation part, or infinity for a run that diverged."""
    try:
        return made.evaluate().perplexity
    except RunError:
        return math.inf


def learned(made: Steps) -> dict[str, float]:
    """Train. Return the last perplexity, and the least perplexity after any third of the run."""
    total = made.total_steps
    thirds = [math.ceil(total / 3), math.ceil(2 * total / 3), total]
    found = []
    for step, batch in enumerate(made.batches(), 1):
        made.step(batch)
        if step in thirds:
            found.append(perplexity(made))
    return {"end": found[-1], "best": min(found)}


def at_the_end(result: dict[str, float]) -> float:
    return result["end"]


def at_best(result: dict[str, float]) -> float:
    return result["best"]


@cache
def read_files(text: Path) -> list[str]:
    """Return the hashes of the base and of the text, which a run reads."""
    _, directory = find_base("mini")
    return [*base_hashes(directory).values(), file_sha256(text)]


def cell(options: Options, measure: Callable[[Steps], Any]) -> str:
    """Return the key of a run's result: the measure, every active option, the hashes of the files,
    and the machine, which affects the last digits.
    """
    chosen = {}
    for name, value in options.as_json().items():
        is_off = value is None or value is False
        if name not in DECIDES_NOTHING and not is_off:
            chosen[name] = value
    decides = {
        "measure": measure.__name__,
        "options": {"method": options.method, **chosen},
        "files": read_files(options.data or options.book[0]),
        **settings(),
    }
    return json.dumps(decides, sort_keys=True)


def known_cells() -> dict[str, Any]:
    """Return the stored results."""
    if not CELLS.exists():
        return {}
    known = {}
    for line in CELLS.read_text().splitlines():
        try:
            kept = json.loads(line)
        except ValueError:  # the line is empty, or a kill cut it off
            continue
        known[kept["cell"]] = kept["result"]
    return known


def finetune(
    method: str,
    seeds: Sequence[int] = (0,),
    measure: Callable[[Steps], Any] = learned,
    **options: Any,
) -> list[Any]:
    """Return the result of `measure`, a function that trains, for each seed.

    By default, a run has 60 steps of 4 windows of 128 tokens. A stored result is returned at once.
    """
    options = {"precision": "fp32"} | SIZE | options

    def run(seed: int) -> Any:
        key = cell(asked_options(method, seed, options), measure)
        return remembered(key, lambda: measure(trainer(method, seed, **options)))

    return [run(seed) for seed in seeds]


def remembered(key: str, measure: Callable[[], Any]) -> Any:
    """Return the stored result. If no result is stored, measure and store it."""
    known = known_cells()
    if key not in known:
        known[key] = json.loads(json.dumps(measure()))
        run = json.loads(key)
        for name in ("files", *settings()):  # the same in each line
            run.pop(name, None)
        print(f"{run}: {known[key]}", flush=True)
        keep(key, known[key])
    return known[key]


def keep(key: str, result: Any) -> None:
    """Append a result to the stored results, in one write, because other processes also append.

    The leading new line ends a line that may have been cut off.
    """
    CELLS.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"cell": key, "result": result})
    with CELLS.open("ab", buffering=0) as file:
        file.write(f"\n{line}\n".encode())


def saved(made: Steps) -> dict[str, float]:
    """Train. Return the base's perplexity, the peak rate, the least perplexity of the base and of
    every epoch, as `train.py` keeps it, and the seconds of the steps and of a search for the rate.
    """
    base = perplexity(made)
    found = [base]
    began = time.process_time()
    lr = made.lr
    seconds = time.process_time() - began
    for step, batch in enumerate(made.batches(), 1):
        began = time.process_time()
        made.step(batch)
        seconds += time.process_time() - began
        if made.plan.epoch_ends(step):
            found.append(perplexity(made))
    return {"base": base, "lr": lr, "perplexity": min(found), "seconds": seconds}


def stored(options: Options) -> dict[str, float]:
    """Return the result of a run with these options. A stored result is returned at once."""
    return remembered(cell(options, saved), lambda: saved(Steps(options)))


def tune(
    method: str,
    guess: float,
    score: Callable[[Any], float] = at_the_end,
    **options: Any,
) -> Runs:
    """Search the best rate of a run on mini, from a guess."""

    def run(lr: float, seeds: Sequence[int]) -> list[Any]:
        return finetune(method, seeds, lr=lr, **options)

    return search(run, guess, SEEDS, score)


def search(
    run: Callable[[float, Sequence[int]], list[Any]],
    guess: float,
    seeds: Sequence[int],
    score: Callable[[Any], float],
) -> Runs:
    """Search the best rate in factors of two from a guess. Return results by rate.

    `run` returns the result of a rate with each seed. The search moves with one seed until the
    rates on both sides of the best rate are worse. Then these three rates run with every seed. The
    search moves on if another rate has the least mean.
    """
    runs: Runs = {}
    best = guess
    for some in (seeds[:1], seeds):
        rate = None
        while rate != best:
            rate = best
            for lr in (rate / 2, rate, rate * 2):
                runs[lr] = run(lr, some)
            best = best_rate(runs, score)
    return dict(sorted(runs.items()))


def search_with_first_seed(
    run: Callable[[float, Sequence[int]], list[Any]],
    guess: float,
    score: Callable[[Any], float],
) -> Runs:
    """Search the best rate with the first seed, and run every seed at the best rate alone."""
    runs = search(run, guess, SEEDS[:1], score)
    best = best_rate(runs, score)
    runs[best] = run(best, SEEDS)
    return runs


def best_rate(runs: dict[Rate, list[Any]], score: Callable[[Any], float] = float) -> Rate:
    """Return the rate with the least mean, among the rates with the most seeds."""
    most = max(len(found) for found in runs.values())
    means = {lr: mean(map(score, found)) for lr, found in runs.items() if len(found) == most}
    return min(means, key=means.__getitem__)


def scored(runs: Runs, score: Callable[[Any], float] = at_the_end) -> dict[float, list[float]]:
    """Return one number of each result."""
    return {lr: [score(result) for result in found] for lr, found in runs.items()}


def compare(
    name: str,
    title: str,
    caption: str,
    choices: dict[str, Choice],
    description: str | None,
    argv: Sequence[str] | None,
) -> dict[str, Runs]:
    """Train LoRA by each choice at the best rate.

    Returns the perplexities by choice and rate, and saves them with a picture.
    """

    def measure() -> dict[str, Runs]:
        data = {}
        for label, (guess, options) in choices.items():
            runs = scored(tune("lora", guess, **options))
            best = best_rate(runs)
            print(f"{label}: {spread(runs[best])} at {best:g}")
            data[label] = runs
        return data

    return experiment(name, measure, partial(draw, title, caption), description, argv)


def draw(title: str, caption: str, data: dict[str, dict[str, list[float]]]) -> Any:
    """Draw a bar for each choice at the best rate, from the least perplexity to the greatest. A
    grey band continues the bar of plain LoRA.
    """
    most = max(len(found) for runs in data.values() for found in runs.values())
    caption += f" Dot and bar: mean and range of {describe_seeds(most)}."
    if PLAIN in data:
        caption += " Grey: the range of plain LoRA."
    figure, (axis,) = panels(title, caption)
    ordered = sorted(data.items(), key=lambda item: mean(item[1][best_rate(item[1])]))
    for label, runs in ordered:
        rate = best_rate(runs)
        found = runs[rate]
        ends = (min(found), max(found))
        middle = mean(found)
        if label == PLAIN:
            axis.axvspan(*ends, color=BASE, alpha=0.2)
        colour = FULL if label.startswith("full") else LORA
        axis.plot(ends, (label, label), color=colour, linewidth=5, solid_capstyle="butt")
        axis.plot(middle, label, "ko", markersize=4)
        words = f"lr {scientific(float(rate))}"
        if len(found) < most:
            words += f", {describe_seeds(len(found))}"
        axis.annotate(
            f"{middle:.1f} ({words})",
            (middle, label),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axis.set(
        xlabel="validation perplexity at the best learning rate (lr)",
        ylim=(len(data) - 0.5, -0.7),
        xmargin=0.12,
    )
    return figure
