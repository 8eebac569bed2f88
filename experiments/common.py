"""Provide what experiments share: options, a trainer on mini, data saved beside a picture."""

import argparse
import json
from collections.abc import Iterable
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
SHORT = {"batch_size": 4, "block_size": 64, "stride": 64, "max_steps": 4, "val_fraction": 0.03}


def parse(description: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, help="default: docs/figures; --short: runs/figures")
    parser.add_argument("--seeds", type=number(int, 1), default=3,
                        help="where there are some (%(default)s)")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / ("runs" if args.short else "docs") / "figures"
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # now, not after an hour's work
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    return args


def trainer(method: str = "lora", seed: int = 0, precision: str = "fp32", short: bool = False,
            **options: object) -> Trainer:
    """Make what `train.py` trains: mini on the default book, on the CPU, no dropout."""
    chosen = replace(parse_options("-", [method, "--base", "mini"]), lora_dropout=0.0, seed=seed,
                     **options | (SHORT if short else {}))
    made = Trainer(chosen, find_base("mini")[1], Device.pick("cpu", precision, train=True))
    made.model.train()
    return made


def mean_loss(made: Trainer, batch) -> Tensor:
    """Return the mean loss over the tokens of these windows, nats."""
    inputs, targets = made.windows.batch(batch)  # (B, T) each
    return made.summed_loss(inputs, targets) / targets.numel()


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Return the mean (min .. max) as text, or one number where they are one."""
    values = [float(value) for value in values]
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


def panels(count: int, title: str):
    """Return a figure of `count` panels in a row."""
    figure, (axes,) = subplots(1, count, figsize=(max(7.2, 4.9 * count), 4.2), squeeze=False)
    figure.suptitle(title, fontsize=12)
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def band(axis, x, y: Tensor, colour: str, label: str, line: str = ".-") -> None:
    """Plot the mean of y (runs, points) over its runs, and a band from minimum to maximum."""
    axis.plot(x, y.mean(0), line, color=colour, label=label)
    axis.fill_between(x, y.amin(0), y.amax(0), color=colour, alpha=0.2)
