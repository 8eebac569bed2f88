"""Provide what experiments share: options, a trainer on mini, data saved beside its picture."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

from torch import Tensor

from common.cli import number
from common.device import Device
from common.figures import BLUE, GREY, RED, YELLOW, save_figure, subplots  # noqa: F401 (for all)
from model.hub import find_base
from train import Trainer
from training.options import ROOT, parse_options

# What a short version trains on, and how long, whatever the whole one does.
SHORT = {"batch_size": 4, "max_steps": 4, "val_fraction": 0.01}


def parse(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--short", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, help="default: docs/figures; --short: runs/figures")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="how many (%(default)s)")
    args = parser.parse_args(argv)
    args.seeds = range(1 if args.short else args.seeds)  # a short version takes the first
    args.out = args.out or ROOT / ("runs" if args.short else "docs") / "figures"
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # now, not after an hour's work
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    return args


def trainer(
    method: str = "lora",
    seed: int = 0,
    precision: str = "fp32",
    short: bool = False,
    **options: object,
) -> Trainer:
    """Make what `train.py` trains: mini on the default book, on the CPU, no dropout."""
    chosen = replace(
        parse_options("-", [method, "--base", "mini"]),
        lora_dropout=0.0,
        seed=seed,
        **options | (SHORT if short else {}),
    )
    return Trainer(chosen, find_base("mini")[1], Device.pick("cpu", precision, train=True))


def mean_loss(made: Trainer, batch) -> Tensor:
    """Return the mean loss over the tokens of these windows, nats."""
    return made.summed_loss(*made.windows.batch(batch)) / made.windows.scored_tokens(batch)


def spread(values: list[float], digits: int = 1) -> str:
    """Return the mean (min .. max) as text, or one number where they are one."""
    least, middle, most = (f"{f(values):.{digits}f}" for f in (min, mean, max))
    return middle + f" ({least} .. {most})" * (least != most)


def save(args: argparse.Namespace, name: str, data: dict, figure) -> dict:
    """Write NAME.json, a line a key, with five digits a number, and NAME.png; return the data."""
    short = json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.5g}"))
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in short.items())
    (args.out / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    save_figure(figure, args.out / f"{name}.png")
    print(f"saved {args.out / name}.json and .png")
    return data


def panels(whole: str, *titles: str):
    """Return a figure and its panels in a row, one for each of `titles`; none: a single one."""
    titles = titles or ("",)
    width = max(7.2, 4.9 * len(titles))
    figure, (axes,) = subplots(1, len(titles), figsize=(width, 4.2), squeeze=False)
    figure.suptitle(whole, fontsize=12)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, axisbelow=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def band(axis, x, y: Tensor, colour: str, label: str, line: str = ".-") -> None:
    """Plot the mean of y (runs, points) over its runs, and a band from minimum to maximum."""
    axis.plot(x, y.mean(0), line, color=colour, label=label)
    axis.fill_between(x, y.amin(0), y.amax(0), color=colour, alpha=0.2)
