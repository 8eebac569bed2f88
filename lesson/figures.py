"""Drawing functions for the lesson's pictures."""

from collections.abc import Sequence
from typing import Any

from common.figures import shade

RANDOM = "#7f9f7b"


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
