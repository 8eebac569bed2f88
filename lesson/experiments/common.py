"""Options of experiments, a trainer on mini, and data saved beside the picture."""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

import torch
from torch import Tensor

from benchmarks.ours import Steps
from benchmarks.parity_report import machine
from common.cli import Parser
from common.errors import run_command
from common.figures import PAGE_WIDTH, save_figure
from common.files import read_json
from data.windows import Batch
from lesson.figures import SMALLEST_TEXT, subplots
from training.options import ROOT, Options, parse_options

Draw = Callable[[dict[str, Any]], Any]  # from an experiment's saved data to a figure

CAPTION_WIDTH = 128  # letters

SEEDS = range(3)


def parse(
    description: str | None,
    argv: Sequence[str] | None,
    name: str | None = None,
    files: bool = False,
) -> argparse.Namespace:
    """Parse an experiment's command line, and make its output directory.

    With a name, `--draw` only draws the picture from an existing NAME.json. With `files`, the
    command takes text files.
    """
    parser = Parser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = description  # all of it, not only its first line
    default = ROOT / "docs" / "figures"
    parser.add_argument("--out", type=Path, default=default, help="default: docs/figures")
    if name:
        help_ = f"draw again from the saved {name}.json; measure nothing"
        parser.add_argument("--draw", action="store_true", help=help_)
    if files:
        parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="more texts")
    args = parser.parse_args(argv)

    try:
        args.out.mkdir(parents=True, exist_ok=True)  # fail now, not after an hour
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    if name and args.draw and not (args.out / f"{name}.json").exists():
        parser.error(f"--draw: {args.out / name}.json is missing: run without --draw first")
    return args


def trainer(
    method: str = "lora",
    seed: int = 0,
    precision: str = "fp32",
    **options: object,
) -> Steps:
    """Make the trainer of `train.py` for mini on the default book, on the CPU, without dropout.

    `options` are options of `train.py` with underscores: `batch_size=8` is `--batch-size 8`.
    """
    choices = {"device": "cpu", "precision": precision, **options}
    return Steps(asked_options(method, seed, choices))


def asked_options(method: str, seed: int, options: dict[str, object]) -> Options:
    """Return the options of the run that `trainer` makes."""
    options = {"seed": seed, **options}
    if method == "lora":
        options["lora_dropout"] = 0
    return train_options(method, options)


def train_options(method: str, choices: dict[str, Any]) -> Options:
    """Return `train.py`'s options for mini, with these choices in place of defaults."""
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
    if "lora_alpha" in choices:  # rsLoRA needs fractions, which the command line refuses
        options = replace(options, lora_alpha=choices["lora_alpha"])
    return options


def mean_loss(made: Steps, batch: Batch) -> Tensor:
    """Return the mean loss over the tokens of a batch, in nats."""
    [(inputs, targets)] = batch.micro_batches  # (B, T) each
    return made.model.loss(inputs, targets) / batch.num_tokens


def gradient(parameter: Tensor) -> Tensor:
    """Return the gradient that a backward pass left in a parameter."""
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
    """Round a number in JSON text to five digits."""
    return float(f"{float(number):.5g}")


def experiment(
    name: str,
    measure: Callable[..., dict[Any, Any]],
    draw: Draw | None,
    description: str | None,
    argv: Sequence[str] | None,
    files: bool = False,
) -> dict[Any, Any]:
    """Measure, save NAME.json and NAME.png, and return the data. With --draw, only draw. If `draw`
    is None, there is no picture. With `files`, `measure` gets the files of the command line.

    `draw` gets the stored results: text as keys, and numbers with five digits.
    """
    args = parse(description, argv, name if draw else None, files)
    path = args.out / f"{name}.json"
    if draw and args.draw:
        data = read_results(path)
    else:
        data = measure(*args.files) if files else measure()
        write_results(path, argv, data)
        print(f"saved {path}")

    if draw:
        save_figure(draw(read_results(path)), args.out / f"{name}.png")
    return data


def as_command(main: Callable[[], Any]) -> NoReturn:
    """Run an experiment as a command: a known failure ends with one line."""

    def command(_: Sequence[str] | None) -> None:
        main()

    run_command(command)


def settings() -> dict[str, Any]:
    """Return what affects the last digits of a result on a CPU."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write_results(path: Path, argv: Sequence[str] | None, data: dict[Any, Any]) -> None:
    """Write how and when the results were measured, and the results: JSON with one key per line and
    five digits per number.
    """
    words = [f"python -m lesson.experiments.{path.stem}"]
    for word in sys.argv[1:] if argv is None else argv:
        words.append(Path(word).name if Path(word).is_file() else word)  # without its directory
    about = {
        "command": " ".join(words),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **settings(),
    }
    rounded = json.loads(json.dumps(data), parse_float=five_digits)
    path.write_text(f'{{\n{json_lines(about)},\n"results": {{\n{json_lines(rounded)}\n}}}}\n')


def json_lines(data: dict[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())


def read_results(path: Path) -> dict[str, Any]:
    """Return stored results: text as keys, and numbers with five digits."""
    return read_json(path)["results"]


def panels(
    whole: str, caption: str, *titles: str, stacked: bool = False, height: float = 4.4
) -> tuple[Any, Any]:
    """Return a figure as wide as a page, and a panel for each title, or a single panel.

    The panels are side by side, or `stacked` on one x axis. The caption below them names what a
    reader of the picture alone must know, such as the model, the rates and the seeds.
    """
    titles = titles or ("",)
    rows, columns = (len(titles), 1) if stacked else (1, len(titles))
    figure, grid = subplots(
        rows, columns, figsize=(PAGE_WIDTH, height), squeeze=False, sharex=stacked
    )
    add_texts(figure, whole, caption)
    axes = grid.flatten()
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
    return figure, axes


def add_texts(figure: Any, whole: str, caption: str) -> None:
    """Write the title above a figure, and the caption below it."""
    figure.suptitle(whole)
    lines = textwrap.fill(caption, CAPTION_WIDTH)
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALLEST_TEXT)


def describe_seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def band(
    axis: Any, x: Sequence[float], y: Tensor, colour: str, label: str = "", line: str = ".-"
) -> None:
    """Plot the mean of y (runs, points) over the runs, and a band from minimum to maximum.

    `label` is for a legend. For few lines, `lesson.figures.name_line` is clearer.
    """
    axis.plot(x, y.mean(0), line, color=colour, label=label)
    axis.fill_between(x, y.amin(0), y.amax(0), color=colour, alpha=0.2, linewidth=0)
