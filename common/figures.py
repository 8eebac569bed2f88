"""Draw with matplotlib, an optional dependency: no result needs it."""

import os
from importlib.util import find_spec
from pathlib import Path

from common.files import atomic_path

RED, BLUE, YELLOW, GREY = "#d1495b", "#00798c", "#edae49", "#6c757d"


def can_draw() -> bool:
    if not (installed := find_spec("matplotlib")):
        print("no picture drawn: pip install matplotlib")
    return bool(installed)


def subplots(*grid: int, figsize: tuple[float, float], **shared: bool):
    """Return a new figure and its axes, in `grid` rows and columns."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its `!` commands inherit, may be missing
    from matplotlib.figure import Figure  # slow to import, and few commands draw

    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(*grid, **shared)


def save_figure(figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
