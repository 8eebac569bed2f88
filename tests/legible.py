"""Find unreadable words in a picture: small words, overlapping words, words cut off."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from unittest import mock

from matplotlib.figure import Figure
from matplotlib.text import Text

from common.figures import PAGE_WIDTH, SMALLEST_TEXT

EXPONENT = 0.7  # matplotlib's relative size of an exponent


@contextmanager
def only_legible_pictures() -> Iterator[list[Figure]]:
    """Check pictures instead of writing them. Yield the list of checked pictures."""
    pictures = []

    def check(figure: Figure, path: Path, **_: object) -> None:
        found = faults(figure)
        assert not found, found
        pictures.append(figure)
        Path(path).touch()

    with mock.patch.object(Figure, "savefig", check):
        yield pictures


def faults(figure: Figure) -> list[str]:
    """Return a line for each word that is unreadable at a page's width."""
    figure.draw_without_rendering()
    texts = shown_texts(figure)
    found = []
    scale = min(1, PAGE_WIDTH / figure.get_figwidth())
    for text in texts:
        size = text.get_fontsize() * scale
        if text.get_parse_math() and "^" in text.get_text() and "$" in text.get_text():
            size *= EXPONENT
        if size < SMALLEST_TEXT:
            found.append(f"{text.get_text()!r} has {size:.1f} points")

    # An annotation counts without its arrow, and letters may overlap by a pixel.
    boxes = [(text, Text.get_window_extent(text).padded(-1)) for text in texts]
    for text, box in boxes:
        if not figure.bbox.containsx(box.x0) or not figure.bbox.containsx(box.x1):
            found.append(f"{text.get_text()!r} runs out of the picture")
        if not figure.bbox.containsy(box.y0) or not figure.bbox.containsy(box.y1):
            found.append(f"{text.get_text()!r} runs out of the picture")
    for (one, box), (other, other_box) in combinations(boxes, 2):
        if box.overlaps(other_box):
            found.append(f"{one.get_text()!r} is on {other.get_text()!r}")
    return found


def shown_texts(figure: Figure) -> list[Text]:
    """Return the picture's words, without ticks outside the view."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                out_of_view = not low - slack <= tick.get_loc() <= high + slack
                if out_of_view or not axes.axison:
                    hidden |= {tick.label1, tick.label2}
    texts = figure.findobj(Text)
    return [t for t in texts if t.get_visible() and t.get_text().strip() and t not in hidden]
