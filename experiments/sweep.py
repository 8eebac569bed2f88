"""Fine-tune mini over and over with other options, and draw what comes out."""

from collections.abc import Callable
from statistics import mean

from torch import Tensor

from experiments.common import GREY, RED, panels, parse, save, spread, trainer
from lora.inject import lora_layers
from train import Trainer


def finetune(method: str, seeds: int = 1, short: bool = False,
             measure: Callable[[Trainer], object] = lambda made: made.evaluate().perplexity,
             first: int = 0, **options: object) -> list:
    """Train 60 steps of 8 windows of 64 tokens with each seed from `first`; measure each result."""
    size = {"batch_size": 8, "block_size": 64, "stride": 64, "max_steps": 60} | options
    result = []
    for seed in range(first, 1 if short else seeds):
        made = trainer(method, seed, "auto", short, **size)
        for batch in made.batches():
            made.step(batch)
        result.append(measure(made))
        print(method, options, f"seed {seed}:", result[-1], flush=True)
    return result


def tuned(method: str, seed: int, short: bool) -> tuple[Trainer, dict[str, Tensor]]:
    """Train; return also the change of each matrix of the blocks that changed."""
    made = trainer(method.lower(), seed, short=short, batch_size=16, max_steps=60,
                   lr=1e-4 if method == "full" and not short else 1e-3)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    for batch in made.batches():
        made.step(batch)
    lora = {f"{n}.weight": layer.delta_weight() for n, layer in lora_layers(made.model).items()}
    return made, lora or {name: p.detach() - before[name] for name, p in
                          made.model.named_parameters() if name.startswith("h.") and p.ndim == 2}


def compare(argv: list[str] | None, name: str, title: str,
            choices: dict[str, tuple[tuple, dict]]) -> dict:
    """Train LoRA with each choice's options at each of its rates with seed 0; draw each choice at
    its best rate, with all seeds, as a bar from the minimum to the maximum.
    """
    args = parse(title, argv)
    data, (figure, (axis,)) = {}, panels(1, title)
    for label, (rates, options) in choices.items():
        runs = data[label] = {lr: finetune("lora", 1, args.short, lr=lr, **options)
                              for lr in (rates[1:2] if args.short else rates)}
        best = min(runs, key=lambda lr: mean(runs[lr]))
        found = runs[best]
        found += finetune("lora", args.seeds, args.short, first=len(found), lr=best, **options)
        if len(data) == 1:
            axis.axvspan(min(found), max(found), color=GREY, alpha=0.2)
        axis.plot([min(found), max(found)], [label, label], color=RED, linewidth=5,
                  solid_capstyle="butt")
        axis.plot(mean(found), label, "ko", markersize=4)
        axis.annotate(f"{mean(found):.1f} (lr {best:g})", (mean(found), label), xytext=(0, 7),
                      textcoords="offset points", ha="center", fontsize=9)
        print(f"{label}: {spread(found)} at {best:g}")
    axis.set(xlabel="perplexity at the best lr: mean, min and max of seeds (grey: first row's)",
             ylim=(len(data) - 0.5, -0.7), xmargin=0.12)
    return save(args, name, data, figure)
