"""Four ways to start A and B, and their first steps: `python -m experiments.initialisation`."""

import math
from itertools import product

import torch
from torch import nn

from experiments import common
from experiments.common import BLUE, GREY, RED, YELLOW, band, mean_loss, panels, parse, save
from lora.inject import adapter_disabled, lora_layers

# name: is A random, is B random, how it is drawn
STARTS = {"A random, B zero (LoRA)": (True, False, RED, "-"),
          "A zero, B random": (False, True, BLUE, "-"),
          "both random": (True, True, YELLOW, "-"),
          "both zero": (False, False, GREY, "--")}
LR = 2e-3
TITLES = {"loss": "loss minus the base's, nats per token", "A": "norm of A's gradient (log)",
          "B": "norm of B's gradient (log)"}


def first_steps(name: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Return the loss less the base's, and the two gradients' norms, before each step."""
    made = common.trainer(seed=seed, batch_size=4, block_size=64, stride=64, max_steps=steps)
    weights = {"A": [], "B": []}
    for layer, part in product(lora_layers(made.model).values(), "AB"):
        weights[part].append(p := layer.get_parameter(f"lora_{part}.weight"))
        random = STARTS[name]["AB".index(part)]
        nn.init.kaiming_uniform_(p, a=math.sqrt(5)) if random else nn.init.zeros_(p)
    optimizer = torch.optim.AdamW(made.parameters.values(), lr=LR)
    result = {part: [] for part in TITLES}
    for batch in made.batches():
        with torch.no_grad(), adapter_disabled(made.model):
            base = mean_loss(made, batch).item()
        loss = mean_loss(made, batch)
        loss.backward()
        result["loss"].append(loss.item() - base)
        for part in weights:
            result[part].append(math.hypot(*(p.grad.norm().item() for p in weights[part])))
        optimizer.step()
        optimizer.zero_grad()
    return result


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    seeds, steps = (1, 3) if args.short else (args.seeds, 12)
    runs = {name: [first_steps(name, seed, steps) for seed in range(seeds)] for name in STARTS}
    figure, axes = panels(3, f"Four starts, before each of {steps} steps (mini; bands: seeds)")
    for axis, (part, title) in zip(axes, TITLES.items(), strict=True):
        for name, (*_, colour, line) in STARTS.items():
            y = torch.tensor([run[part] for run in runs[name]])  # (seeds, steps)
            band(axis, range(steps), y, colour, name, f".{line}")
        axis.set(title=title, xlabel="steps taken", xticks=range(0, steps, 2))
        if part != "loss":  # zero must be seen, and so must what is far above it
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set_ylim(bottom=-0.001)
    axes[0].legend(fontsize=9, loc="upper right")
    save(args, "initialisation", {"lr": LR, "steps": steps, "seeds": seeds, "runs": runs}, figure)
    return runs


if __name__ == "__main__":
    main()
