"""Draw docs/figures/lora.png, one LoRA layer: `python -m lesson.experiments.diagram`."""

from common.figures import RED, save_figure, subplots
from lesson.experiments.common import parse

BLUE, INK = "#c9d6df", "#30343f"
SHAPES = (
    ([(5.6, 0.3), (9.6, 0.3), (9.6, 1.1), (5.6, 1.1)], "white"),
    ([(1.2, 2.9), (5.8, 2.9), (5.8, 6.3), (1.2, 6.3)], BLUE),
    ([(8.6, 2.6), (13.2, 2.6), (11.3, 3.9), (10.5, 3.9)], RED),  # A narrows to r numbers,
    ([(10.5, 5.3), (11.3, 5.3), (14.0, 6.6), (7.8, 6.6)], RED),  # and B widens again
    ([(6.8, 7.4), (8.4, 7.4), (8.4, 8.2), (6.8, 8.2)], "white"),
)
ARROWS = (
    (10.9, 3.9, 10.9, 5.3),
    (6.6, 1.1, 3.5, 2.9),
    (8.6, 1.1, 10.9, 2.6),
    (3.5, 6.3, 6.8, 7.6),
    (10.9, 6.6, 8.4, 7.6),
    (7.6, 8.2, 7.6, 8.85),
)
TEXTS = {
    "x  (768 numbers)": (7.6, 0.7, INK),
    "+": (7.6, 7.8, INK),
    "A  8 x 768": (10.9, 3.15, "w"),
    "W x + b\n\nW  2304 x 768, frozen:\n1,769,472 parameters": (3.5, 4.6, INK),
    "B  2304 x 8": (10.9, 6.1, "w"),
    "y  (2304 numbers: q, k and v)": (7.6, 9.1, INK),
    r"times $\alpha / r$ = 16 / 8 = 2": (10.2, 7.25, INK, "left"),
    "r = 8 numbers": (10.6, 4.6, INK, "right"),
    "dropout": (10.3, 1.75, INK, "left"),
    "A and B, trained:\n24,576 parameters,\n1.4 % of W's": (12.1, 5.0, RED, "left"),
}


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    figure, axes = subplots(figsize=(7.6, 4.6))
    axes.set(xlim=(0, 15.2), ylim=(0, 9.4))
    axes.axis("off")
    for corners, colour in SHAPES:
        axes.fill(*zip(*corners, strict=True), facecolor=colour, edgecolor=INK)
    for *start, x, y in ARROWS:
        axes.annotate(
            "",
            (x, y),
            start,
            arrowprops={
                "arrowstyle": "-|>",
                "mutation_scale": 14,
                "color": INK,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    for words, (x, y, colour, *side) in TEXTS.items():
        axes.text(
            x,
            y,
            words,
            ha=(side or ["center"])[0],
            va="center",
            color=colour,
            fontsize=9 if colour == RED else 11,
        )
    save_figure(figure, args.out / "lora.png")


if __name__ == "__main__":
    main()
