"""The pictures: a run's `loss.png`, and the comparison of several runs."""

from pathlib import Path

from files import atomic_path
from training.directory import read_metrics

try:
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a directory's name is a $
    from matplotlib import pyplot
except ImportError:  # an extra: training does not need it
    pyplot = None

COLOURS = {"train": "#9db4c0", "lora": "#d1495b", "full": "#00798c", "base": "#6c757d"}


def draw_loss(out: Path, method: str, base_val_loss: float) -> bool:
    """`loss.png` from `metrics.jsonl`: training loss, validation loss, and the base's as a line."""
    if not _can_draw():
        return False
    lines = read_metrics(out)
    validated = [line for line in lines if "val_loss" in line]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines],
              color=COLOURS["train"], label="training (dropout on)")
    axes.plot([0, *(line["step"] for line in validated)],
              [base_val_loss, *(line["val_loss"] for line in validated)],
              color=COLOURS[method], marker="o", label="validation")
    axes.axhline(base_val_loss, color=COLOURS["base"], linestyle="--", linewidth=1,
                 label="base, validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"{method}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, out / "loss.png")


def draw_comparison(base: str, base_perplexity: float, runs: list[tuple[Path, dict]],
                    path: Path) -> bool:
    """Validation perplexity, trainable parameters and time of each run, base included."""
    if not _can_draw():
        return False
    names = [f"{run['method']}\n({directory.name})" for directory, run in runs]
    colours = [COLOURS[run["method"]] for _, run in runs]
    figure, (quality, size, speed) = pyplot.subplots(1, 3, figsize=(11, 4), layout="constrained")
    _bars(quality, [f"base\n({Path(base).name})", *names],
          [base_perplexity, *(run["best_val_perplexity"] for _, run in runs)],
          [COLOURS["base"], *colours], "validation perplexity (lower is better)", "{:.1f}")
    _bars(size, names, [run["trainable_parameters"] for _, run in runs], colours,
          "trainable parameters (log scale)", "{:,.0f}")
    size.set_yscale("log")
    _bars(speed, names, [run["seconds"] for _, run in runs], colours,
          "seconds, validation included", "{:,.0f}")
    return save_figure(figure, path)


def _bars(axes, names: list[str], values: list[float], colours: list[str], title: str,
          label: str) -> None:
    bars = axes.bar(range(len(names)), values, tick_label=names, color=colours, width=0.6)
    axes.bar_label(bars, labels=[label.format(value) for value in values], padding=2)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _can_draw() -> bool:
    if pyplot is None:
        print("no picture drawn: pip install matplotlib")
    return pyplot is not None


def save_figure(figure, path: Path) -> bool:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    return True
