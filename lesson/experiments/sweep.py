"""Fine-tune mini over and over with other options, and draw what comes out."""

from collections.abc import Callable, Iterable
from statistics import mean

from torch import Tensor

from lesson.experiments.common import GREY, RED, Trainer, panels, parse, save, spread, trainer
from lora.inject import lora_layers


def finetune(
    method: str,
    seeds: Iterable[int] = (0,),
    short: bool = False,
    measure: Callable = lambda made: made.evaluate().perplexity,
    **options,
) -> list:
    """Train 60 steps of 8 windows of 64 tokens with each seed; measure each result."""
    size = {"batch_size": 8, "block_size": 64, "stride": 64, "max_steps": 60} | options
    result = []
    for seed in seeds:
        made = trainer(method, seed, "auto", short, **size)
        for batch in made.batches():
            made.step(batch)
        result.append(measure(made))
        print(method, options, f"seed {seed}:", result[-1], flush=True)
    return result


def tuned(method: str, seed: int, short: bool) -> tuple[Trainer, dict[str, Tensor]]:
    """Train; return also the change of each matrix of the blocks that changed."""
    made = trainer(
        method.lower(),
        seed,
        short=short,
        batch_size=16,
        max_steps=60,
        lr=1e-4 if method == "full" and not short else 1e-3,
    )
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    for batch in made.batches():
        made.step(batch)
    lora = {f"{n}.weight": layer.delta_weight() for n, layer in lora_layers(made.model).items()}
    return made, lora or {
        name: p.detach() - before[name]
        for name, p in made.model.named_parameters()
        if name.startswith("h.") and p.ndim == 2
    }


def compare(argv: list[str] | None, name: str, title: str, choices: dict[str, tuple]) -> dict:
    """Train each choice at its rates with the first seed, and at the best with all; draw a bar."""
    args = parse(title, argv)
    data, (figure, (axis,)) = {}, panels(title)
    for label, (rates, options) in choices.items():
        runs = data[label] = {
            lr: finetune("lora", args.seeds[:1], args.short, lr=lr, **options)
            for lr in (rates[1:2] if args.short else rates)
        }
        best = min(runs, key=runs.get)
        found = runs[best]
        found += finetune("lora", args.seeds[1:], args.short, lr=best, **options)
        ends, middle = (min(found), max(found)), mean(found)
        if len(data) == 1:
            axis.axvspan(*ends, color=GREY, alpha=0.2)
        axis.plot(ends, (label, label), color=RED, linewidth=5, solid_capstyle="butt")
        axis.plot(middle, label, "ko", markersize=4)
        axis.annotate(
            f"{middle:.1f} (lr {best:g})",
            (middle, label),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
        print(f"{label}: {spread(found)} at {best:g}")
    axis.set(
        xlabel="perplexity at the best lr: mean, min and max of seeds (grey: first row's)",
        ylim=(len(data) - 0.5, -0.7),
        xmargin=0.12,
    )
    return save(args, name, data, figure)
