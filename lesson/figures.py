"""Drawing functions for the lesson's pictures.

A series that is not a method, such as a rank or a precision, gets a shade of a method's colour
(common/figures.py) or of OTHER.
"""

from collections.abc import Sequence
from typing import Any

from common.figures import new_figure

SMALLEST_TEXT = 9  # points
OTHER = "#8e3a80"
RANDOM = "#7f9f7b"


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **settings: Any
) -> tuple[Any, Any]:
    """Return a new figure and its axes, as matplotlib's `subplots` does with these settings."""
    figure = new_figure(figsize)
    return figure, figure.subplots(rows, columns, **settings)


def name_line(
    axes: Any,
    words: str,
    place: tuple[float, float],
    colour: str,
    offset: tuple[float, float] = (5, 0),
    side: str = "left",
) -> None:
    """Write the name of a line at a data point, with an offset of `offset` points.

    The name has a darker shade of the line's colour, because letters are thin. `side` is the end of
    the words that is at the point.
    """
    axes.annotate(
        words,
        place,
        offset,
        textcoords="offset points",
        color=shade(colour, 0.3),
        ha=side,
        va="center",
        annotation_clip=False,
        parse_math=False,
    )


def draw_at(axis: Any, numbers: Sequence[float], names: Sequence[object] | None = None) -> None:
    """Put ticks only at these numbers of a matplotlib axis, labelled with these names."""
    axis.set_ticks(numbers, names or [f"{number:g}" for number in numbers])
    axis.set_ticks([], minor=True)


def shades(colour: str, count: int) -> list[str]:
    """Return `count` shades of a colour `#rrggbb`, from dark to light."""
    return [shade(colour, (i + 0.5) / count) for i in range(count)]


def shade(colour: str, lightness: float) -> str:
    """Mix a colour with black (lightness 0 to 0.5) or white (0.5 to 1). 0.5 keeps the colour."""
    end = 0 if lightness < 0.5 else 255
    share = 1.2 * abs(lightness - 0.5)  # the share of black or white, at most 3/5
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(channel + share * (end - channel)) for channel in channels]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
