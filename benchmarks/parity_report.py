"""Print losses and verdicts of the parity check, and write `parity.json`."""

import math
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.device import Device
from common.files import write_json

ROWS = 5  # printed for each curve


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

    def broken(self) -> list[str]:
        return [check["name"] for check in self.checks if not check["ok"]]

    def write(self, out: Path) -> None:
        """Write `parity.json`."""
        results = {"machine": machine(), "versions": versions(), "holds": not self.broken()}
        results |= {"checks": self.checks, "curves": self.curves}
        write_json(out / "parity.json", self.facts | results)


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
