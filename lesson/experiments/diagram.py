"""Draw one LoRA layer, docs/figures/lora.png: `python -m lesson.experiments.diagram`.

Nothing is measured. The layer is GPT-2's c_attn at rank 8; a test holds its numbers.
"""

from collections.abc import Sequence

from common.figures import LORA, save_figure, subplots
from lesson.experiments.common import parse

PALE_BLUE = "#c9d6df"
INK = "#30343f"

# Corners, and the colour between them.
SHAPES = (
    (((5.6, 0.3), (9.6, 0.3), (9.6, 1.1), (5.6, 1.1)), "white"),
    (((1.2, 2.9), (5.8, 2.9), (5.8, 6.3), (1.2, 6.3)), PALE_BLUE),
    (((8.6, 2.6), (13.2, 2.6), (11.3, 3.9), (10.5, 3.9)), LORA),  # A narrows to r numbers,
    (((10.5, 5.3), (11.3, 5.3), (14.0, 6.6), (7.8, 6.6)), LORA),  # and B widens again
    (((6.8, 7.4), (8.4, 7.4), (8.4, 8.2), (6.8, 8.2)), "white"),
)

# From one point to another.
ARROWS = (
    ((10.9, 3.9), (10.9, 5.3)),
    ((6.6, 1.1), (3.5, 2.9)),
    ((8.6, 1.1), (10.9, 2.6)),
    ((3.5, 6.3), (6.8, 7.6)),
    ((10.9, 6.6), (8.4, 7.6)),
    ((7.6, 8.2), (7.6, 8.85)),
)
ARROW_STYLE = {"arrowstyle": "-|>", "mutation_scale": 14, "color": INK, "shrinkA": 0, "shrinkB": 0}

# Words, the point where they stand, their colour, size and horizontal alignment.
TEXTS = (
    ("x  (768 numbers)", (7.6, 0.7), INK, 11, "center"),
    ("+", (7.6, 7.8), INK, 11, "center"),
    ("A  8 x 768", (10.9, 3.15), "w", 11, "center"),
    ("W x + b\n\nW  2304 x 768, frozen:\n1,769,472 parameters", (3.5, 4.6), INK, 11, "center"),
    ("B  2304 x 8", (10.9, 6.1), "w", 11, "center"),
    ("y  (2304 numbers: q, k and v)", (7.6, 9.1), INK, 11, "center"),
    (r"times $\alpha / r$ = 16 / 8 = 2", (10.2, 7.25), INK, 11, "left"),
    ("r = 8 numbers", (10.6, 4.6), INK, 11, "right"),
    ("dropout", (10.3, 1.75), INK, 11, "left"),
    ("A and B, trained:\n24,576 parameters,\n1.4 % of W's", (12.1, 5.0), LORA, 9, "left"),
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(__doc__, argv)
    figure, axes = subplots(figsize=(7.6, 4.6))
    axes.set(xlim=(0, 15.2), ylim=(0, 9.4))
    axes.axis("off")

    for corners, colour in SHAPES:
        xs = [x for x, _ in corners]
        ys = [y for _, y in corners]
        axes.fill(xs, ys, facecolor=colour, edgecolor=INK)
    for start, end in ARROWS:
        axes.annotate("", end, start, arrowprops=ARROW_STYLE)
    for words, place, colour, size, side in TEXTS:
        axes.text(*place, words, color=colour, fontsize=size, ha=side, va="center")

    save_figure(figure, args.out / "lora.png")


if __name__ == "__main__":
    main()
