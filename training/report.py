"""Write `run.json` and `loss.png` at a run's end, and compare finished runs."""

import json
import math
import os
import sys
import textwrap
from pathlib import Path

from torch import nn

from adapters.files import WEIGHTS as ADAPTER_WEIGHTS
from common.cli import print_table
from common.errors import UserError
from common.figures import BLUE, GREY, RED, can_draw, save_figure, subplots
from common.files import read_json, write_json
from model.weights import WEIGHTS as MODEL_WEIGHTS
from training.directory import METRICS, RUN
from training.options import Options

PICTURE = "compare.png"
COLOURS = {"train": "#9db4c0", "lora": RED, "full": BLUE, "base": GREY}
NUMBERS = (
    "batch_size",
    "lr",
    "steps",
    "trainable_parameters",
    "base_val_loss",
    "best_val_loss",
    "best_val_bits_per_byte",
    "seconds",
    "tokens_per_second",
    "peak_memory_mb",
)
COLUMNS = (
    "",
    "batch",
    "peak lr",
    "steps",
    "trained",
    "val loss",
    "perplexity",
    "bits/byte",
    "seconds",
    "tokens/s",
    "peak MB",
    "MB on disk",
)


def perplexity(loss: float) -> float:
    """Return exp(loss)."""
    return math.exp(min(loss, 700.0))  # e^700 is near the largest float


def count_parameters(model: nn.Module) -> dict[str, float]:
    """Count the model's parameters as `run.json` names them; a tied weight counts once."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
    }


def describe_parameters(model: nn.Module) -> str:
    """Return the line that PEFT's `print_trainable_parameters` would print."""
    return (
        "trainable params: {trainable_parameters:,d} || all params: {total_parameters:,d} || "
        "trainable%: {trainable_percent:.4f}".format(**count_parameters(model))
    )


def write_report(options: Options, report: dict) -> None:
    """Write `run.json` and draw `loss.png`."""
    best, base = report["best_val_loss"], report["base_val_loss"]
    write_json(
        options.out / RUN, {"base": options.base, **report, "best_val_perplexity": perplexity(best)}
    )
    draw_loss(options, base, report["start_val_loss"])
    print(
        f"best: val perplexity {perplexity(best):.3f} (base {perplexity(base):.3f}) "
        f"after {report['seconds']:.0f} s; saved in {options.out}"
    )
    if best > base:
        print("warning: that is worse than the base; try a lower --lr", file=sys.stderr)


def printable(text: str) -> str:
    """Return a path's text in a form that fits a table; a path need not be UTF-8."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else " " for c in text)


def read_run(directory: Path) -> dict:
    """Read a finished run's `run.json`. Raises UserError if it is missing or malformed."""
    path = directory / RUN
    if os.path.exists(directory / METRICS) and not os.path.exists(path):
        raise UserError(f"{directory}: the run is not finished; --resume continues it")
    run = read_json(path)
    texts, options = [run.get("base"), run.get("book_sha256")], run.get("options")
    values = run | options if isinstance(options, dict) else {}
    if (
        run.get("method") not in ("lora", "full")
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(run.get("base_sha256"), dict)
        or not all(
            isinstance(values.get(name), int | float)
            and (values[name] == 0 or 1e-99 < values[name] < 1e99)
            for name in NUMBERS
        )
    ):
        raise UserError(
            f"{path}: is not what this version of train.py leaves at a run's end; "
            "train again with --overwrite"
        )
    return run


def best_weights(out: Path, method: str) -> Path:
    """Return the file in which a run keeps the weights with the best validation loss."""
    return out / (ADAPTER_WEIGHTS if method == "lora" else MODEL_WEIGHTS)


def compare(directories: list[Path]) -> None:
    """Print the table of finished runs and their bases, and draw it beside the first run."""
    measures: dict[str, list] = {}  # runs whose losses are comparable, under one key
    directories = [d for d in directories if d.name != PICTURE] or directories  # as in runs/*
    names = [os.path.basename(os.path.realpath(directory)) for directory in directories]
    if len(set(names)) < len(names):  # as with a/lora and b/lora
        names = list(map(str, directories))
    for directory, name in zip(directories, names, strict=True):
        run = read_run(directory) | {"name": printable(name)}
        measure = [
            run["base_sha256"],
            run["book_sha256"],
            *map(run["options"].get, ("val_fraction", "block_size", "label_shift")),
        ]
        measures.setdefault(str(measure), []).append((directory, run))
    if len(measures) > 1:
        print(
            "note: these runs differ in base, book, split, block or label shift; losses compare "
            "only within a base and the runs below it"
        )
    rows = [
        row
        for runs in measures.values()
        for row in (_base_cells(runs[0][1]), *(_cells(*run) for run in runs))
    ]
    print_table(COLUMNS, rows)
    draw_comparison(list(measures.values()), directories[0].resolve().parent / PICTURE)


def _base_cells(run: dict) -> list[str]:
    """Return the row of a run's base; its loss is over the tokens and bytes of the run's."""
    loss, best = run["base_val_loss"], run["best_val_loss"]
    bits = f"{run['best_val_bits_per_byte'] * loss / best:.4f}" if best else "-"
    return [
        f"base {printable(run['base'])}",
        "-",
        "-",
        "-",
        "0",
        f"{loss:.4f}",
        f"{perplexity(loss):.2f}",
        bits,
        "-",
        "-",
        "-",
        "-",
    ]


def _cells(directory: Path, run: dict) -> list[str]:
    weights = best_weights(directory, run["method"])
    if not weights.is_file():
        raise UserError(f"{weights}: is missing; the run is not whole")
    options = run["options"]
    return [
        f"{run['method']} ({run['name']})",
        f"{options['batch_size']:,}",
        f"{options['lr']:g}",
        f"{run['steps']:,}",
        f"{run['trainable_parameters']:,}",
        f"{run['best_val_loss']:.4f}",
        f"{perplexity(run['best_val_loss']):.2f}",
        f"{run['best_val_bits_per_byte']:.4f}",
        f"{run['seconds']:,.0f}",
        f"{run['tokens_per_second']:,.0f}",
        f"{run['peak_memory_mb']:,.0f}",
        f"{weights.stat().st_size / 1e6:,.2f}",
    ]


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]


def draw_loss(options: Options, base_val_loss: float, start_val_loss: float) -> None:
    """Draw `loss.png`: training loss, validation loss, and the base's as a line."""
    if not can_draw():
        return
    lines = read_metrics(options.out)
    validated = [
        (0, start_val_loss),
        *((line["step"], line["val_loss"]) for line in lines if "val_loss" in line),
    ]
    figure, axes = subplots(figsize=(8, 4.5))
    axes.plot(
        [line["step"] for line in lines],
        [line["loss"] for line in lines],
        color=COLOURS["train"],
        label="training",
    )
    axes.plot(
        *zip(*validated, strict=True), color=COLOURS[options.method], marker="o", label="validation"
    )
    axes.axhline(
        base_val_loss, color=COLOURS["base"], linestyle="--", linewidth=1, label="base, validation"
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"{options.method}: loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, options.out / "loss.png")


def _label(kind: str, name: str) -> str:
    """Return a bar's label, in lines that fit under the bar."""
    parts = f"({name})".replace(",", ",\n").split("\n")
    return "\n".join([kind, *(line for part in parts for line in textwrap.wrap(part, 12))])


def draw_comparison(measures: list[list[tuple[Path, dict]]], path: Path) -> None:
    """Draw validation perplexity, each base before its runs, and parameters and time of each run.

    Each list holds runs whose losses are comparable.
    """
    if not can_draw():
        return
    bars = []  # label, colour, and a value in each panel; a base has only the first
    for runs in measures:
        base = runs[0][1]
        bars.append(
            (
                _label("base", printable(Path(base["base"]).name)),
                COLOURS["base"],
                perplexity(base["base_val_loss"]),
                math.nan,
                math.nan,
            )
        )
        bars += [
            (
                _label(run["method"], run["name"]),
                COLOURS[run["method"]],
                perplexity(run["best_val_loss"]),
                run["trainable_parameters"],
                run["seconds"],
            )
            for _, run in runs
        ]
    names, colours, *values = zip(*bars, strict=True)
    figure, panels = subplots(1, 3, figsize=(max(11, 3 * len(bars)), 4))
    titles = {
        "validation perplexity (lower is better)": "{:.1f}",
        "trainable parameters (log scale)": "{:,.0f}",
        "seconds, validation included": "{:,.0f}",
    }
    for axes, heights, (title, label) in zip(panels, values, titles.items(), strict=True):
        drawn = axes.bar(range(len(names)), [*map(float, heights)], color=[*colours], width=0.6)
        axes.bar_label(drawn, labels=[label.format(value) for value in heights], padding=2)
        axes.set_xticks(range(len(names)), names, parse_math=False)  # a $ in a name is a $
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_yscale("log")
    save_figure(figure, path)
    print(f"drawn in {path}")
