"""Draw a LoRA layer and the product of B and A: `python -m lesson.experiments.diagram`.

Nothing is measured. docs/figures/lora.png shows the layer, GPT-2's c_attn at rank 8.
docs/figures/product.png shows the product, the change of attn.c_proj, drawn to scale. A test checks
the numbers in both pictures.
"""

from collections.abc import Sequence
from typing import Any

from common.figures import BASE, INK, LORA, PAGE_WIDTH, save_figure
from lesson.experiments.common import as_command, parse
from lesson.figures import subplots

# All positions are in inches from the picture's lower left corner.
# Boxes: left, bottom, width, height, colour, strength of the colour.
Box = tuple[float, float, float, float, str, float]
Arrow = tuple[tuple[float, float], tuple[float, float]]
# Words, their position, colour, size and horizontal alignment.
Text = tuple[str, tuple[float, float], str, float, str]

# The layer: 768 numbers are 0.7 inches long, 2304 numbers are 2.1 inches, and 8 are 0.1 inches.
LAYER_BOXES: tuple[Box, ...] = (
    (0.6, 1.9, 0.1, 0.7, INK, 0.5),  # x
    (2.2, 2.4, 0.7, 2.1, BASE, 0.3),  # W
    (2.2, 0.85, 0.7, 0.1, LORA, 1),  # A
    (3.8, 0.85, 0.1, 0.1, LORA, 0.4),  # A x
    (4.8, 0.1, 0.1, 2.1, LORA, 1),  # B
    (7.5, 1.2, 0.1, 2.1, INK, 0.5),  # y
)
LAYER_ARROWS: tuple[Arrow, ...] = (
    ((0.8, 2.4), (2.1, 3.45)),
    ((0.8, 2.1), (2.1, 0.95)),
    ((3.0, 0.9), (3.7, 0.9)),
    ((4.0, 0.9), (4.7, 0.9)),
    ((3.0, 3.45), (6.48, 2.4)),
    ((5.0, 0.9), (6.48, 2.1)),
    ((6.8, 2.25), (7.4, 2.25)),
)
LAYER_TEXTS: tuple[Text, ...] = (
    ("LoRA of rank 8\non GPT-2's c_attn", (0.1, 4.2), INK, 11, "left"),
    ("x", (0.65, 2.8), INK, 13, "center"),
    ("768\nnumbers", (0.65, 1.6), INK, 10, "center"),
    ("W", (2.55, 3.45), INK, 13, "center"),
    ("2304 x 768, frozen:\n1,769,472 parameters", (3.05, 4.2), BASE, 10, "left"),
    ("W x + b", (4.7, 3.15), INK, 11, "left"),
    ("A", (2.55, 1.15), LORA, 13, "center"),
    ("8 x 768", (2.55, 0.65), LORA, 10, "center"),
    ("A x", (3.85, 1.15), INK, 11, "center"),
    ("8 numbers", (3.85, 0.65), INK, 10, "center"),
    ("B", (5.05, 2.05), LORA, 13, "left"),
    ("2304 x 8", (5.05, 0.3), LORA, 10, "left"),
    ("times \N{GREEK SMALL LETTER ALPHA} / r\n= 16 / 8 = 2", (5.9, 1.3), INK, 11, "left"),
    (
        "A and B, trained: 24,576 parameters,\n1.4 % of W's (drawn too thick)",
        (1.2, 0.2),
        LORA,
        10,
        "left",
    ),
    ("+", (6.63, 2.25), INK, 16, "center"),
    ("y", (7.55, 3.5), INK, 13, "center"),
    ("2304 numbers:\nq, k and v", (7.55, 0.9), INK, 10, "center"),
)

# The product: 768 numbers are 3 inches long, so 8 numbers are 1/32 of an inch.
SIDE = 3.0
THIN = SIDE * 8 / 768
PRODUCT_BOXES: tuple[Box, ...] = (
    (0.6, 0.3, THIN, SIDE, LORA, 1),  # B
    (1.3, 0.3 + SIDE - THIN, SIDE, THIN, LORA, 1),  # A
    (5.1, 0.3, SIDE, SIDE, LORA, 0.25),  # their product
)
PRODUCT_TEXTS: tuple[Text, ...] = (
    ("B", (0.6, 3.55), LORA, 13, "center"),
    ("768 x 8\n6,144 numbers", (0.75, 1.8), LORA, 10, "left"),
    ("\N{MULTIPLICATION SIGN}", (0.96, 3.28), INK, 16, "center"),
    ("A", (2.8, 3.55), LORA, 13, "center"),
    ("8 x 768\n6,144 numbers", (2.8, 3.0), LORA, 10, "center"),
    ("=", (4.7, 1.8), INK, 18, "center"),
    ("B A, the change of W", (6.6, 3.55), LORA, 13, "center"),
    ("768 x 768\n589,824 numbers", (6.6, 1.8), INK, 10, "center"),
    ("12,288 numbers are trained\nin place of 589,824: a 48th", (2.8, 1.1), INK, 11, "center"),
    ("drawn to scale: GPT-2's attn.c_proj, rank 8", (2.8, 0.4), INK, 9, "center"),
)


def picture(
    height: float, boxes: Sequence[Box], arrows: Sequence[Arrow], texts: Sequence[Text]
) -> Any:
    """Draw boxes, arrows and words on a page of this height."""
    figure, axes = subplots(figsize=(PAGE_WIDTH, height))
    figure.set_layout_engine("constrained", w_pad=0, h_pad=0)
    axes.set(xlim=(0, PAGE_WIDTH), ylim=(0, height), aspect="equal")
    axes.axis("off")

    for left, bottom, width, tall, colour, strength in boxes:
        xs = (left, left + width, left + width, left)
        ys = (bottom, bottom, bottom + tall, bottom + tall)
        axes.fill(xs, ys, facecolor=colour, alpha=strength, linewidth=0)
    for start, end in arrows:
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": INK, "shrinkA": 0}
        axes.annotate("", end, start, arrowprops=style)
    for words, place, colour, size, side in texts:
        axes.text(*place, words, color=colour, fontsize=size, ha=side, va="center")
    return figure


def draw_layer() -> Any:
    return picture(4.6, LAYER_BOXES, LAYER_ARROWS, LAYER_TEXTS)


def draw_product() -> Any:
    return picture(3.8, PRODUCT_BOXES, (), PRODUCT_TEXTS)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(__doc__, argv)
    save_figure(draw_layer(), args.out / "lora.png")
    save_figure(draw_product(), args.out / "product.png")


if __name__ == "__main__":
    as_command(main)
