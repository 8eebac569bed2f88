"""Draw what only the lesson's pictures have."""

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
    """Write a line's name beside it: at a point of the data, `offset` points off.

    Its colour is the line's, darker, as thin letters need. `side` is the end of the words that
    stands there.
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
