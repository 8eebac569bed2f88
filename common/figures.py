"""Draw pictures with matplotlib, an optional dependency.

A colour has the same meaning in every picture, and the colour-blind can tell all colours apart.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.files import NotWritable, atomic_path

BASE = "#5f6368"
LORA = "#c85200"
FULL = "#0068a8"
METHODS = {"base": BASE, "lora": LORA, "full": FULL}
INK = "#2b2d33"  # the colour of text and outlines

# A page shows a picture about 800 pixels wide, at 96 pixels per inch, and shrinks wider pictures.
PAGE_WIDTH = 8.3  # inches

STYLE: dict[Any, Any] = {
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e7ea",
    "lines.linewidth": 1.8,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def can_draw() -> bool:
    installed = find_spec("matplotlib") is not None
    if not installed:
        print("no picture drawn: pip install matplotlib")
    return installed


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty matplotlib figure of this width and height in inches, in our style."""
    # In a notebook, `!python ...` inherits MPLBACKEND, which names the notebook's backend. The
    # command may lack this backend.
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib  # slow to import, and few commands draw
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    return Figure(size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure as PNG and print its path. Warn if the path cannot be written."""
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=160, format="png")
    except NotWritable as error:
        print(f"warning: {error}", file=sys.stderr)
    else:
        print(f"drawn in {path}")


def scientific(number: float, position: object = None) -> str:
    """Return a number of any size in the form 3e-4. matplotlib accepts this function as a tick
    formatter."""
    digits, exponent = f"{number:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
