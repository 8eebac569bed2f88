"""Draw with matplotlib, an extra: no result needs it."""

from pathlib import Path

from common.files import atomic_path

try:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

RED, BLUE, YELLOW, GREY = "#d1495b", "#00798c", "#edae49", "#6c757d"


def can_draw() -> bool:
    if pyplot is None:
        print("no picture drawn: pip install matplotlib")
    return pyplot is not None


def save_figure(figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
