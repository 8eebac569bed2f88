"""Four ways to start A and B, and the first steps of each: `python -m experiments.initialisation`.

LoRA of rank 8 on mini's c_attn, AdamW, no dropout. Every start sees the same windows in the same
order, and its loss is taken against the base's on these windows.
"""

import math

import torch
from torch import nn

from experiments.common import BLUE, GREY, RED, YELLOW, mean_loss, panels, parse, save, trainer
from lora.inject import adapter_disabled, lora_layers

# name: is A random, is B random, how it is drawn
STARTS = {"A random, B zero (LoRA)": (True, False, RED, "-"),
          "A zero, B random": (False, True, BLUE, "-"),
          "both random": (True, True, YELLOW, "-"),
          "both zero": (False, False, GREY, "--")}
LR = 2e-3


def start(model: nn.Module, *random: bool) -> None:
    for layer in lora_layers(model).values():
        for linear, is_random in zip((layer.lora_A, layer.lora_B), random, strict=True):
            if is_random:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            else:
                nn.init.zeros_(linear.weight)


def gradient_norm(model: nn.Module, part: str) -> float:
    """The norm over all layers' A, or all layers' B, as one vector."""
    return math.hypot(*(getattr(layer, part).weight.grad.norm().item()
                        for layer in lora_layers(model).values()))


def first_steps(name: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Loss less the base's, and the two gradients' norms, before each step."""
    made = trainer(seed=seed, batch_size=4, block_size=64, stride=64, max_steps=steps)
    start(made.model, *STARTS[name][:2])
    optimizer = torch.optim.AdamW(made.parameters.values(), lr=LR)
    result = {"loss": [], "A": [], "B": []}
    for batch in made.batches():
        with torch.no_grad(), adapter_disabled(made.model):
            base = mean_loss(made, batch).item()
        loss = mean_loss(made, batch)
        loss.backward()
        result["loss"].append(loss.item() - base)
        for part in "AB":
            result[part].append(gradient_norm(made.model, f"lora_{part}"))
        optimizer.step()
        optimizer.zero_grad()
    return result


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv, seeds=3)
    seeds, steps = (1, 4) if args.short else (args.seeds, 12)
    data = {name: [first_steps(name, seed, steps) for seed in range(seeds)] for name in STARTS}
    figure, axes = panels(3, f"The first {steps} steps from four starts (mini, c_attn, rank 8; "
                          f"mean of {seeds} seed(s), band: least to most)")
    for axis, part, title in zip(axes, ("loss", "A", "B"), (
            "loss less the base's, nats a token", "norm of A's gradient", "norm of B's gradient"),
            strict=True):
        for name, (*_, colour, line) in STARTS.items():
            values = torch.tensor([run[part] for run in data[name]])  # (seeds, steps)
            axis.plot(values.mean(0), line, color=colour, marker=".", label=name)
            axis.fill_between(range(steps), values.amin(0), values.amax(0), color=colour, alpha=0.2)
        axis.set(title=title, xlabel="steps taken", xticks=range(0, steps, 2))
        if part != "loss":  # zero must be seen, and so must what is far above it
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set_ylim(bottom=-0.001)
    axes[0].legend(fontsize=9, loc="upper right")
    save(args, "initialisation", {"lr": LR, "steps": steps, "seeds": seeds, "runs": data}, figure)
    for name, runs in data.items():
        loss, a, b = (torch.tensor([run[part] for run in runs]) for part in ("loss", "A", "B"))
        print(f"{name:24} step 0: loss {loss[:, 0].mean():+.3f}, |dA| {a[:, 0].mean():.3f}, |dB| "
              f"{b[:, 0].mean():.3f}; last: loss {loss[:, -1].mean():+.3f} "
              f"({loss[:, -1].min():+.3f} .. {loss[:, -1].max():+.3f})")
    return data


if __name__ == "__main__":
    main()
