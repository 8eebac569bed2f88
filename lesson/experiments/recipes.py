"""Is `--recipe best` ever worse than `--recipe reference`? `python -m lesson.experiments.recipes`

Varied: the recipe, and one option or the text. Where no option names the layers, the reference
adapts c_attn, and best all four.
Fixed: mini in fp32, and every other option of `train.py`. Of the book, a run trains on the first
1,792 tokens (14 windows), and validates on the usual validation part. Another text ends after 9,000
characters, and its last third is the validation part. Of the examples, it is the last tenth.
Measured: the perplexity of the adapter that `train.py` saves, and the processor time of the steps,
with three seeds.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from common.figures import BASE, LORA, PAGE_WIDTH, draw_at, shades, subplots
from data.windows import Windows
from lesson.experiments.common import (
    SHORT,
    Steps,
    add_texts,
    as_command,
    describe_seeds,
    experiment,
    train_options,
    trainer,
)
from lesson.experiments.sweep import cell, perplexity, remembered
from lesson.figures import name_line
from training.options import BEST, REFERENCE, ROOT, Options

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "c_attn": {"target_modules": ("c_attn",)},
    "c_fc": {"target_modules": ("c_fc",)},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "LoRA+, ratio 16": {"loraplus_lr_ratio": 16.0},
    "alpha 64": {"lora_alpha": 64},
    "rank 64": {"r": 64},
    "rsLoRA, rank 64": {"use_rslora": True, "r": 64},
    "pseudo-Latin text": {"book": ROOT / "benchmarks" / "pseudo-latin.txt"},
    "JSON lines as a text": {"book": ROOT / "data" / "speakers-train.jsonl"},
    "instructions": {"data": ROOT / "data" / "instructions.jsonl"},
}
TOKENS = 1792  # of the book's training part
CHARACTERS = 9000  # of another text. 6,000 of them are 2,400 to 2,800 training tokens


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


def stored(options: Options, short: bool) -> dict[str, float]:
    """Return the result of a run with these options. A stored result is returned at once."""
    return remembered(cell(options, saved, short), lambda: saved(Steps(options)))


def run(words: dict[str, Any], seed: int, short: bool) -> dict[str, float]:
    words = {"device": "cpu", "precision": "fp32", "seed": seed, **words}
    if short:
        words = SHORT | words
    return stored(train_options("lora", words), short)


def short_book(folder: Path) -> dict[str, Any]:
    """Write the beginning of the book's training part, and the validation part, to one file. Return
    the options that train on the one and validate on the other.
    """
    data = trainer().data
    assert isinstance(data.training, Windows) and isinstance(data.validation, Windows)
    validation = data.validation.tokens.tolist()
    ids = data.training.tokens[:TOKENS].tolist() + validation
    path = folder / "book.txt"
    path.write_text(data.tokenizer.decode(ids))
    return {"book": path, "val_fraction": (len(validation) + 0.5) / len(ids)}


def short_text(folder: Path, text: Path) -> dict[str, Any]:
    """Write the beginning of a text to a file. Return the options that train on it."""
    path = folder / text.name
    path.write_text(text.read_text()[:CHARACTERS])
    return {"book": path, "val_fraction": 1 / 3}


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return the result with each seed, by configuration and recipe."""
    data: dict[str, Any] = {label: {REFERENCE: [], BEST: []} for label in CONFIGURATIONS}
    with TemporaryDirectory() as name:
        folder = Path(name)
        book = short_book(folder)
        for seed in args.seeds:
            for label, options in CONFIGURATIONS.items():
                if "book" in options:
                    options = options | short_text(folder, options["book"])
                elif "data" not in options:
                    options = options | book
                for recipe, found in data[label].items():
                    found.append(run({"recipe": recipe, **options}, seed, args.short))
                    print(f"{label}, {recipe}: {found[-1]}", flush=True)
    return data


def draw(data: dict[str, Any]) -> Any:
    """Draw the mean perplexities of the base and both recipes for each configuration: for the book
    above, and for other texts below.
    """
    others = [label for label, options in CONFIGURATIONS.items() if {"book", "data"} & set(options)]
    book = [label for label in CONFIGURATIONS if label not in others]
    heights = (len(book), len(others) + 1)
    figure, (above, below) = subplots(2, figsize=(PAGE_WIDTH, 6.8), height_ratios=heights)
    count = len(next(iter(data.values()))[BEST])
    caption = (
        "reference adapts c_attn at lr 3e-4. best adapts all four layers of a block, and its rate "
        "depends on the length of the run. Both have rank 8 and alpha 16. An option in a row "
        "replaces these values. Windows of 128 tokens, three epochs, fp32, means of "
        f"{describe_seeds(count)}."
    )
    add_texts(figure, "The recipes best and reference, by adapter and by text (mini)", caption)
    draw_rows(above, {label: data[label] for label in book})
    draw_rows(below, {label: data[label] for label in others})
    above.set(xlabel="validation perplexity, after training on 14 windows of the book")
    below.set(xscale="log", xlabel="validation perplexity, after training on another text (log)")
    draw_at(below.xaxis, (5, 10, 20, 50, 100, 200, 500))
    return figure


def draw_rows(axis: Any, rows: dict[str, Any]) -> None:
    """Draw a row for each configuration. A line joins the recipes."""
    dark, light = shades(LORA, 2)
    labels = ["no option" if label == "LoRA" else label for label in rows]
    series = (
        (BEST, "perplexity", BEST, dark, "o", "center"),
        (REFERENCE, "perplexity", REFERENCE, light, "o", "right"),
        (BEST, "base", "the base", BASE, "|", "left"),
    )
    points = []
    for recipe, key, name, colour, marker, side in series:
        x = [mean(run[key] for run in recipes[recipe]) for recipes in rows.values()]
        axis.plot(x, labels, marker, color=colour)
        name_line(axis, name, (x[0], 0), colour, (0, 11), side)
        points.append(x)
    axis.hlines(labels, *points[:2], color=BASE, linewidth=1, zorder=1)
    axis.set(ylim=(len(rows) - 0.5, -1), xmargin=0.08)


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("recipes", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
