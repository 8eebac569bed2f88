"""Pictures are drawn to files with any matplotlib backend, and everyone can read them."""

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from benchmarks import parity_report, speed_report
from common.figures import BASE, FULL, LORA, PAGE_WIDTH, scientific, subplots
from lesson.figures import RANDOM
from tests.helpers import drawing
from tests.legible import faults, only_legible_pictures
from training.options import ROOT

# How the three kinds of colour-blindness transform linear red, green and blue
# (Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113, severity 1).
SEEN_BY = {
    "all three": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = XYZ.sum(1)


def test_a_notebooks_backend_is_not_needed():
    """Jupyter and Colab export a backend to `!make train-lora`. .venv does not contain it."""
    code = "from common.figures import subplots; subplots(figsize=(1, 1))"
    environment = os.environ | {"MPLBACKEND": "not installed"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)


@pytest.mark.parametrize("eyes", SEEN_BY)
def test_the_colours_differ_for_everyone(eyes):
    """The distance in CIELAB is at least 20. A distance of 2.3 is just noticeable."""
    seen = [lab(np.array(SEEN_BY[eyes]) @ linear(c)) for c in (BASE, LORA, FULL, RANDOM)]
    for one, other in combinations(seen, 2):
        assert np.linalg.norm(one - other) > 20


def linear(colour: str) -> np.ndarray:
    """Return sRGB's red, green and blue as linear light."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(XYZ @ light.clip(0, 1) / WHITE)  # dark colours would need a linear part
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_numbers_of_all_sizes_are_written_alike():
    assert list(map(scientific, (3e-5, 0.0015, 2.0))) == ["3e-5", "1.5e-3", "2e0"]


@drawing()
def test_pictures_of_commands_can_be_read(tmp_path):
    """Pictures of both kinds of benchmark, and of the parity report."""
    spread = {"median": 1.5, "min": 1.25, "max": 2.0}
    machine = {"base": "mini", "machine": "2-core x86-64 CPU", "date": "2026-11-28", "rounds": 3}
    along = [
        {"contender": name, "axis": axis, "size": size, "seconds": spread, "peak_mb": spread}
        for name in ("here", "PEFT + transformers")
        for axis, size in (("batch_size", 4), ("batch_size", 16), ("block_size", 128), ("r", 8))
    ]
    pair = {"theirs": "PEFT, LoRA, bf16", "ours": "here, LoRA, bf16"}
    ratio = pair | {"as_it_comes": spread, "alike": spread}
    curves = {
        name: {"here": [4.0, 3.5], "there": [4.0, 3.25]} for name in ("exact", "bf16", "full")
    }
    report = parity_report.Report()
    report.curves |= curves

    with only_legible_pictures() as pictures:
        summary = {"contenders": dict(enumerate(along)), "ratios": []}
        speed_report.draw(machine | {"summary": summary}, tmp_path / "axes.png")
        summary = {"contenders": {"here": {"axis": ""}}, "ratios": [ratio, ratio]}
        speed_report.draw(machine | {"summary": summary}, tmp_path / "ratios.png")
        report.draw(tmp_path / "parity.png")
    assert len(pictures) == 3


def test_what_cannot_be_read_is_found():
    """tests/test_experiments.py makes this check on every published picture."""
    figure, axes = subplots(figsize=(PAGE_WIDTH, 3))
    axes.set(title="a title", xlabel="x")
    assert faults(figure) == []

    small = axes.text(0.5, 0.5, "small", fontsize=8)
    assert faults(figure) == ["'small' has 8.0 points"]
    small.remove()

    axes.text(0.5, 0.5, "one")
    other = axes.text(0.51, 0.5, "another")
    assert faults(figure) == ["'one' is on 'another'"]
    other.remove()

    far = axes.text(0.9, 0.5, "so long that it ends behind the edge")
    far.set_in_layout(False)
    assert faults(figure) == [f"{far.get_text()!r} runs out of the picture"]
    far.remove()

    figure.set_figwidth(2 * PAGE_WIDTH)
    assert "'a title' has 5.2 points" in faults(figure)
