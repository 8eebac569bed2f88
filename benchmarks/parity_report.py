"""Print tables and verdicts of the parity check. Write `parity.json` and `parity.png`."""

import math
import os
import platform
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.device import Device
from common.errors import first_line
from common.figures import (
    LORA,
    OTHER,
    PAGE_WIDTH,
    can_draw,
    save_figure,
    scientific,
    shades,
    subplots,
)
from common.files import write_json

ROWS = 5  # printed for each curve
FLOOR = 1e-10  # a difference of zero is drawn here, because the axis is logarithmic


class Report:
    """Print each figure as soon as it is known, and record the figure with its limit."""

    def __init__(self) -> None:
        self.checks: list[dict] = []
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.facts: dict = {}

    def curve(self, name: str, here: list[float], there: list[float], **more: list[float]) -> None:
        """Record the losses of each step on both sides, and print some of them."""
        self.curves[name] = {"here": here, "there": there, **more}
        print(f"    {name}\n      step     loss here    loss there    difference")

        last = len(here) - 1
        every = math.ceil(len(here) / ROWS)
        for step in sorted({*range(0, len(here), every), last}):
            print(
                f"    {step + 1:6d}  {here[step]:12.8f}  {there[step]:12.8f}"
                f"  {abs(here[step] - there[step]):12.2g}"
            )

    def check(self, name: str, value: float, allowed: float) -> None:
        """Print and record a verdict: `value` must be a number, and at most `allowed`."""
        ok = bool(value <= allowed)
        self.checks.append(
            {"name": name, "value": float(value), "allowed": float(allowed), "ok": ok}
        )
        verdict = "ok" if ok else "FAILED"
        print(f"{verdict:6}  {name}: {value:.2g} (allowed: {allowed:.2g})")

    def fail(self, name: str, why: str) -> None:
        """Record that the check `name` could not be made."""
        self.checks.append(
            {"name": f"{name}: {why}", "value": math.inf, "allowed": 0.0, "ok": False}
        )
        print(f"FAILED  {name}: {why}")

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Turn an exception inside the `with` into a failure of `name` only."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(name, f"{type(error).__name__}: {first_line(error)}")

    def broken(self) -> list[str]:
        return [check["name"] for check in self.checks if not check["ok"]]

    def write(self, out: Path) -> None:
        """Write `parity.json` and `parity.png`."""
        write_json(
            out / "parity.json",
            {
                **self.facts,
                "machine": machine(),
                "versions": versions(),
                "holds": not self.broken(),
                "checks": self.checks,
                "curves": self.curves,
            },
        )
        if can_draw():
            self.draw(out / "parity.png")

    def draw(self, path: Path) -> None:
        """Draw the two curves of the exact run, and the differences of every pair of runs."""
        rows = math.ceil(len(self.curves) / 2)  # in the lower panel's legend
        size = (PAGE_WIDTH, 6.5 + 0.25 * rows)
        figure, (upper, lower) = subplots(2, 1, figsize=size)
        draw_exact(upper, self.curves["exact"])
        draw_differences(lower, self.curves)

        upper.legend()
        lower.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        for axes in (upper, lower):
            axes.xaxis.get_major_locator().set_params(integer=True)
        save_figure(figure, path)


def draw_exact(axes: Any, exact: dict[str, list[float]]) -> None:
    steps = range(1, len(exact["here"]) + 1)
    axes.plot(steps, exact["there"], color=OTHER, alpha=0.4, linewidth=5, label="PEFT")
    axes.plot(steps, exact["here"], color=LORA, linewidth=1, label="this project")
    axes.set(
        xlabel="step",
        ylabel="training loss (nats a token)",
        title="fp32, one thread, all dropouts on",
    )


def draw_differences(axes: Any, curves: dict[str, dict[str, list[float]]]) -> None:
    """Draw each pair's differences. If PEFT ran with several seeds, draw the spread of its runs."""
    colours = shades(OTHER, len(curves))
    for (name, pair), colour in zip(curves.items(), colours, strict=True):
        here = np.array(pair["here"])
        there = np.array(pair["there"])
        difference = np.abs(here - there) / there
        steps = range(1, len(here) + 1)
        style = "--" if name.startswith(("bf16", "fp16")) else "-"
        label = f"{name} (at most {difference.max():.1g})"
        axes.plot(steps, np.maximum(difference, FLOOR), style, color=colour, label=label)

        if "spread" in pair:
            spread = np.array(pair["spread"]) / there
            label = f"{name}: PEFT's own, seed to seed"
            axes.plot(steps, spread, ":", color=colour, label=label)

    axes.set(
        xlabel="step",
        ylabel=f"difference / loss (0 is drawn at {FLOOR:.0e})",
        yscale="log",
        title="difference from PEFT, every comparison",
    )
    axes.yaxis.set_major_formatter(scientific)


def snapshot(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in parameters.items()}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of parameters, or inf if the names differ."""
    if a.keys() != b.keys():
        return math.inf
    differences = [(a[name] - b[name]).abs().max() for name in a]
    return torch.stack(differences).max().item()


def relative(here: list[float], there: list[float]) -> float:
    """Return the largest difference of two curves, relative to the second curve."""
    return float(np.max(np.abs(np.subtract(here, there)) / there))


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def machine() -> str:
    """Return the GPU's name, or the CPU's cores, name, family and model as the system shows them,
    with the instruction sets that PyTorch reports. The machine's own name is not part of it.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine().replace("_", "-")
    if sys.platform == "linux":
        fields = dict(re.findall(r"(\S.*?)\s*: (.+)", Path("/proc/cpuinfo").read_text()))
        if "cpu family" in fields:  # a virtual machine's CPU often has a name without the model
            name = f"{fields['model name']} family {fields['cpu family']} model {fields['model']}"
    instructions = torch.backends.cpu.get_cpu_capability()
    if Device.pick("cpu", train=True).precision == "bf16":
        instructions += " bf16"
    return f"{os.cpu_count()} cores, {name}, {instructions}"


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"python": platform.python_version(), **packages}
