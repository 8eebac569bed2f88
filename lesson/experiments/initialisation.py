"""How should A and B start? `python -m lesson.experiments.initialisation`

Varied: which of A and B are random at the start, and which are zero.
Fixed: mini, LoRA on c_attn at rank 8, AdamW at lr 2e-3, 12 steps of 4 windows of 64 tokens.
Measured before each step, with three seeds: the loss minus the base's on the same windows, and the
norms of A's and of B's gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.figures import BASE, FULL, LORA, OTHER
from lesson.experiments.common import band, gradient, mean_loss, panels, parse, save, trainer
from lora.inject import adapter_disabled

# name: which of A and B are random, and how it is drawn
STARTS = {
    "A random, B zero (LoRA)": ("A", LORA, "-"),
    "A zero, B random": ("B", FULL, "-"),
    "both random": ("AB", OTHER, "-"),
    "both zero": ("", BASE, "--"),
}
LR = 2e-3
TITLES = {
    "loss": "loss minus the base's, nats per token",
    "A": "norm of A's gradient (log)",
    "B": "norm of B's gradient (log)",
}


def start(parameters: dict[str, nn.Parameter], random: str) -> dict[str, list[nn.Parameter]]:
    """Draw those of A and B that `random` names, set the others to zero; return both by name."""
    weights: dict[str, list[nn.Parameter]] = {"A": [], "B": []}
    for name, parameter in parameters.items():
        part = "A" if "lora_A" in name else "B"
        weights[part].append(parameter)
        if part in random:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        else:
            nn.init.zeros_(parameter)
    return weights


def gradient_norm(parameters: Sequence[Tensor]) -> float:
    """Return the norm of all their gradients together."""
    return math.hypot(*[gradient(parameter).norm().item() for parameter in parameters])


def first_steps(random: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Train; return the loss minus the base's, and the two gradients' norms, before each step."""
    made = trainer(seed=seed, batch_size=4, block_size=64, stride=64, max_steps=steps)
    weights = start(made.parameters, random)
    optimizer = torch.optim.AdamW(made.parameters.values(), lr=LR)

    measured: dict[str, list[float]] = {"loss": [], "A": [], "B": []}
    for batch in made.batches():
        with torch.no_grad(), adapter_disabled(made.model):
            base = mean_loss(made, batch).item()
        loss = mean_loss(made, batch)
        loss.backward()

        measured["loss"].append(loss.item() - base)
        for part, parameters in weights.items():
            measured[part].append(gradient_norm(parameters))

        optimizer.step()
        optimizer.zero_grad()
    return measured


def main(argv: Sequence[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    steps = 3 if args.short else 12
    runs = {}
    for name, (random, _, _) in STARTS.items():
        runs[name] = [first_steps(random, seed, steps) for seed in args.seeds]

    title = f"Four starts, before each of {steps} steps (mini; bands: seeds)"
    figure, axes = panels(title, *TITLES.values())
    for axis, part in zip(axes, TITLES, strict=True):
        for name, (_, colour, line) in STARTS.items():
            y = torch.tensor([run[part] for run in runs[name]])  # (seeds, steps)
            band(axis, range(steps), y, colour, name, f".{line}")
        axis.set(xlabel="steps taken", xticks=range(0, steps, 2))
        if part != "loss":  # to show zero, and values far above it
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set_ylim(bottom=-0.001)
    axes[0].legend(fontsize=9, loc="upper right")

    data = {"lr": LR, "steps": steps, "seeds": len(args.seeds), "runs": runs}
    save(args, "initialisation", data, figure)
    return runs


if __name__ == "__main__":
    main()
