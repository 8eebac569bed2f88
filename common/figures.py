"""Draw with matplotlib, an optional dependency: no result needs it."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED = "#d1495b"
BLUE = "#00798c"
YELLOW = "#edae49"
GREY = "#6c757d"


def can_draw() -> bool:
    installed = find_spec("matplotlib") is not None
    if not installed:
        print("no picture drawn: pip install matplotlib")
    return installed


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **settings: Any
) -> "tuple[Figure, Any]":
    """Return a new figure and its axes, as matplotlib's `subplots` does with these settings."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's `!` inherits its own, which may be missing
    from matplotlib.figure import Figure  # slow to import, and few commands draw

    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def save_figure(figure: "Figure", path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
