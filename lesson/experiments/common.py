"""What experiments share: their options, a trainer on mini, and data saved beside its picture."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from torch import Tensor

from common.cli import number
from common.device import Device
from common.figures import BLUE, GREY, RED, YELLOW, save_figure, subplots  # noqa: F401 (for all)
from model.hub import find_base
from train import Trainer, make_trainer
from training.build import resolve
from training.options import ROOT, Options, parse_options

# Every short version's options, in place of the whole one's.
SHORT: dict[str, object] = {"batch_size": 4, "max_steps": 4, "val_fraction": 0.01}


def parse(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read an experiment's command line, and make the directory that it saves to.

    `seeds` is a range: 0, 1, ... A short version takes the first alone.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=Path, help="default: docs/figures; --short: runs/figures")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="how many (%(default)s)")
    args = parser.parse_args(argv)

    args.seeds = range(args.seeds)
    if args.short:
        args.seeds = range(1)

    if args.out is None:
        place = "runs" if args.short else "docs"
        args.out = ROOT / place / "figures"
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
    """Make what `train.py` trains: mini on the default book, on the CPU, without dropout.

    `options` are `train.py`'s, with underscores: `batch_size=8` is `--batch-size 8`.
    """
    device = Device.pick("cpu", precision, train=True)
    _, directory = find_base("mini")
    return make_trainer(resolved(method, seed, device, short, options), directory, device)


def resolved(
    method: str, seed: int, device: Device, short: bool, options: dict[str, object]
) -> Options:
    """Return all of a run's options."""
    options = {"seed": seed, **options}
    if short:
        options |= SHORT
    if method == "lora":
        options["lora_dropout"] = 0
    base, _ = find_base("mini")
    return resolve(train_options(method, options), base, device)


def train_options(method: str, choices: dict[str, Any]) -> Options:
    """Return `train.py`'s options for mini, with these choices in place of its defaults."""
    words = [method, "--base", "mini"]
    for name, value in choices.items():
        if name == "lora_alpha" or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))

    options = parse_options("-", words)
    if "lora_alpha" in choices:  # rsLoRA's may be a fraction, which the command line refuses
        assert options.lora
        lora = replace(options.lora, lora_alpha=choices["lora_alpha"])
        options = replace(options, lora=lora)
    return options


def mean_loss(made: Trainer, batch: np.ndarray) -> Tensor:
    """Return the mean loss over the tokens of the windows `batch` (B,), in nats."""
    inputs, targets = made.data.training.batch(batch)  # (B, T) each
    return made.summed_loss(inputs, targets) / made.data.training.scored_tokens(batch)


def gradient(parameter: Tensor) -> Tensor:
    """Return the gradient that a backward pass has left here."""
    assert parameter.grad is not None
    return parameter.grad


def spread(values: list[float], digits: int = 1) -> str:
    """Return the mean (min .. max) as text, or one number if all three are printed alike."""
    least = f"{min(values):.{digits}f}"
    middle = f"{mean(values):.{digits}f}"
    most = f"{max(values):.{digits}f}"
    if least == most:
        return middle
    return f"{middle} ({least} .. {most})"


def five_digits(number: str) -> float:
    """Round a number of a JSON text."""
    return float(f"{float(number):.5g}")


def save(args: argparse.Namespace, name: str, data: dict[Any, Any], figure: Any) -> dict:
    """Write NAME.json, a key a line with five digits a number, and NAME.png; return the data."""
    rounded = json.loads(json.dumps(data), parse_float=five_digits)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rounded.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (args.out / f"{name}.json").write_text(text)
    save_figure(figure, args.out / f"{name}.png")
    print(f"saved {args.out / name}.json and .png")
    return data


def panels(whole: str, *titles: str) -> tuple[Any, Any]:
    """Return a figure and its row of panels: one for each title, or a single one without titles."""
    titles = titles or ("",)
    width = max(7.2, 4.9 * len(titles))
    figure, rows = subplots(1, len(titles), figsize=(width, 4.2), squeeze=False)
    axes = rows[0]
    figure.suptitle(whole, fontsize=12)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, axisbelow=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def band(
    axis: Any, x: Sequence[float], y: Tensor, colour: str, label: str, line: str = ".-"
) -> None:
    """Plot the mean of y (runs, points) over its runs, and a band from minimum to maximum."""
    axis.plot(x, y.mean(0), line, color=colour, label=label)
    axis.fill_between(x, y.amin(0), y.amax(0), color=colour, alpha=0.2)
