"""Draw the LoRA layer for the README: `python -m experiments.diagram` -> docs/figures/lora.png."""

from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from common.figures import save_figure
from training.options import ROOT

FIGURES = ROOT / "docs" / "figures"

FROZEN, TRAINED, INK = "#c9d6df", "#d1495b", "#30343f"


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(7.6, 4.6), layout="constrained")
    axes.set(xlim=(0, 15.2), ylim=(0, 9.4))
    axes.axis("off")
    box(axes, 5.6, 0.3, 4.0, 0.8, "x  (768 numbers)", "white", INK)
    axes.add_patch(Rectangle((1.2, 2.9), 4.6, 3.4, facecolor=FROZEN, edgecolor=INK))
    text(axes, 3.5, 4.6, "W  2304 x 768\n\nfrozen: the base's\n1,769,472 numbers", INK)
    # A narrows to r numbers, B widens again.
    axes.add_patch(Polygon([(8.6, 2.6), (13.2, 2.6), (11.3, 3.9), (10.5, 3.9)],
                           facecolor=TRAINED, edgecolor=INK))
    text(axes, 10.9, 3.15, "A  8 x 768", "white")
    axes.add_patch(Polygon([(10.5, 5.3), (11.3, 5.3), (14.0, 6.6), (7.8, 6.6)],
                           facecolor=TRAINED, edgecolor=INK))
    text(axes, 10.9, 6.1, "B  2304 x 8", "white")
    text(axes, 10.6, 4.6, "r = 8 numbers", INK, "right")
    arrow(axes, (10.9, 3.9), (10.9, 5.3))
    arrow(axes, (6.6, 1.1), (3.5, 2.9))
    arrow(axes, (8.6, 1.1), (10.9, 2.6))
    text(axes, 10.3, 1.75, "dropout", INK, "left")
    arrow(axes, (3.5, 6.3), (6.8, 7.6))
    arrow(axes, (10.9, 6.6), (8.4, 7.6))
    text(axes, 10.2, 7.25, r"times $\alpha / r$ = 2", INK, "left")
    box(axes, 6.8, 7.4, 1.6, 0.8, "+", "white", INK)
    arrow(axes, (7.6, 8.2), (7.6, 8.85))
    text(axes, 7.6, 9.1, "y  (2304 numbers: q, k and v)", INK)
    text(axes, 12.1, 5.0, "A and B: trained,\n24,576 numbers,\n1.4 % of W's", TRAINED, "left", 9)
    FIGURES.mkdir(parents=True, exist_ok=True)
    save_figure(figure, FIGURES / "lora.png")


def box(axes, x: float, y: float, width: float, height: float, label: str, face: str,
        ink: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=ink))
    text(axes, x + width / 2, y + height / 2, label, ink)


def text(axes, x: float, y: float, words: str, colour: str, align: str = "center",
         size: float = 11) -> None:
    axes.text(x, y, words, ha=align, va="center", color=colour, fontsize=size)


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK,
                                   shrinkA=0, shrinkB=0))


if __name__ == "__main__":
    main()
