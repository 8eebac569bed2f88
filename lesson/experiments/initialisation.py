"""Start A and B in four ways and train: `python -m lesson.experiments.initialisation`."""

import math

import torch
from torch import nn

from common.figures import BLUE, GREY, RED, YELLOW
from lesson.experiments.common import band, mean_loss, panels, parse, save, trainer
from lora.inject import adapter_disabled

# name: which of A and B are random, and how it is drawn
STARTS = {
    "A random, B zero (LoRA)": ("A", RED, "-"),
    "A zero, B random": ("B", BLUE, "-"),
    "both random": ("AB", YELLOW, "-"),
    "both zero": ("", GREY, "--"),
}
LR = 2e-3
TITLES = {
    "loss": "loss minus the base's, nats per token",
    "A": "norm of A's gradient (log)",
    "B": "norm of B's gradient (log)",
}


def first_steps(random: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Return the loss less the base's, and the two gradients' norms, before each step."""
    made = trainer(seed=seed, batch_size=4, block_size=64, stride=64, max_steps=steps)
    weights = {"A": [], "B": []}
    for name, p in made.parameters.items():
        weights[part := "A" if "lora_A" in name else "B"].append(p)
        nn.init.kaiming_uniform_(p, a=math.sqrt(5)) if part in random else nn.init.zeros_(p)
    optimizer = torch.optim.AdamW(made.parameters.values(), lr=LR)
    rows = []
    for batch in made.batches():
        with torch.no_grad(), adapter_disabled(made.model):
            base = mean_loss(made, batch).item()
        loss = mean_loss(made, batch)
        loss.backward()
        norms = [math.hypot(*(p.grad.norm().item() for p in weights[part])) for part in "AB"]
        rows.append((loss.item() - base, *norms))
        optimizer.step()
        optimizer.zero_grad()
    return dict(zip(TITLES, map(list, zip(*rows, strict=True)), strict=True))


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    steps = 3 if args.short else 12
    runs = {
        name: [first_steps(random, seed, steps) for seed in args.seeds]
        for name, (random, *_) in STARTS.items()
    }
    figure, axes = panels(
        f"Four starts, before each of {steps} steps (mini; bands: seeds)", *TITLES.values()
    )
    for axis, part in zip(axes, TITLES, strict=True):
        for name, (_, colour, line) in STARTS.items():
            y = torch.tensor([run[part] for run in runs[name]])  # (seeds, steps)
            band(axis, range(steps), y, colour, name, f".{line}")
        axis.set(xlabel="steps taken", xticks=range(0, steps, 2))
        if part != "loss":  # zero must be seen, and so must what is far above it
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set_ylim(bottom=-0.001)
    axes[0].legend(fontsize=9, loc="upper right")
    data = {"lr": LR, "steps": steps, "seeds": len(args.seeds), "runs": runs}
    return save(args, "initialisation", data, figure)["runs"]


if __name__ == "__main__":
    main()
