"""Does a curve show a bug? `python -m lesson.experiments.curves`

Varied: ten bugs, each a switch that patches the one page (`one_page.py`) from outside.
Fixed: mini, LoRA on all four layers of a block, one epoch of 4 windows of 128 tokens per step, at
the rate of `--recipe best`. The right program runs with eight seeds, and each bug with seed 0.
Measured: the training losses and the validation perplexity that the run shows, and the perplexity
of the saved adapter in the right program.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import one_page
from common.figures import BASE, LORA, PAGE_WIDTH
from lesson.experiments.common import add_texts, as_command, experiment, spread
from lesson.figures import subplots

SEEDS = 8  # of the right program
SETTINGS: dict[str, Any] = {
    "TARGETS": ("c_attn", "c_proj", "c_fc"),
    "STRIDE": 128,
    "BATCH": 4,
    "EPOCHS": 1,
    "PEAK_LR": 8e-3,
    "CUDA": False,
    "DEVICE": "cpu",
}
TOY = "[a toy](bugs.md#labels-that-are-shifted-twice)"
EXERCISE = "[exercise 9](exercises.md#9-a-mean-of-means)"
BLOCKS = 7  # points of a curve, each a mean of training losses
LOSS, CLIP, SCALER = one_page.total_loss, nn.utils.clip_grad_norm_, torch.amp.GradScaler


class AlphaForgotten(one_page.LoRALinear):
    def __init__(self, base_layer: nn.Linear):
        super().__init__(base_layer)
        self.scaling = 1.0


class DropoutAfterA(one_page.LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_dropout(self.lora_A(x)))


class InBf16(one_page.LoRALinear):
    def __init__(self, base_layer: nn.Linear):
        super().__init__(base_layer)
        self.lora_A.bfloat16()
        self.lora_B.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_B(self.lora_A(self.lora_dropout(x).bfloat16()))
        return self.base_layer(x) + self.scaling * update


class FrozenB(one_page.LoRALinear):
    def __init__(self, base_layer: nn.Linear):
        super().__init__(base_layer)
        self.lora_B.requires_grad_(False)


class BothRandom(one_page.LoRALinear):
    def __init__(self, base_layer: nn.Linear):
        super().__init__(base_layer)
        nn.init.kaiming_uniform_(self.lora_B.weight, a=math.sqrt(5))


class MergedTwice(one_page.LoRALinear):
    """W + 2 s B A, as after two merges."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__(base_layer)
        self.scaling *= 2


class ClipFirst(SCALER):  # type: ignore[misc, valid-type]
    """Clip the gradients while they are 2^16 times too large, as in fp16."""

    def __init__(self, device: str, enabled: bool):
        super().__init__(device)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        CLIP(optimizer.param_groups[0]["params"], one_page.CLIP)
        super().unscale_(optimizer)


def mean_of_means(model: one_page.GPT2, rows: Tensor) -> Tensor:
    """Split a batch into its last window and the others, and average both means."""
    if len(rows) == 1:
        return LOSS(model, rows)
    parts = (rows[:-1], rows[-1:])
    means = [LOSS(model, part) / part[:, 1:].numel() for part in parts]
    return (means[0] + means[1]) / 2 * rows[:, 1:].numel()


def shifted_twice(model: one_page.GPT2, rows: Tensor) -> Tensor:
    """Score each token on the token after the next one."""
    logits = model(rows[:, :-1])[:, :-1]  # (B, T - 1, V)
    mean_loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 2:].flatten())
    return mean_loss * rows[:, 1:].numel()


@dataclass(frozen=True)
class Bug:
    name: str
    switch: Callable[[], Sequence[Any]]  # the patches
    check: str  # that tells it
    layer_of_use: type[one_page.LoRALinear] = one_page.LoRALinear  # with the saved adapter


def on_the_page(name: str, value: object) -> Callable[[], Sequence[Any]]:
    return lambda: [mock.patch.object(one_page, name, value)]


def clip_first() -> Sequence[Any]:
    return [
        mock.patch.object(torch.amp, "GradScaler", ClipFirst),
        mock.patch.object(nn.utils, "clip_grad_norm_", lambda parameters, limit: None),
    ]


# In the order of the anonymous curves, A to J. The checks are on the bench, or on pages.
BUGS = (
    Bug("dropout after A", on_the_page("LoRALinear", DropoutAfterA), "`dropout_before_a`"),
    Bug("A and B random", on_the_page("LoRALinear", BothRandom), "`new_adapter_changes_nothing`"),
    Bug("merged twice", lambda: [], "`merging_twice_is_merging_once`", MergedTwice),
    Bug(
        "clipped before unscaling",
        clip_first,
        "[exercise 10](exercises.md#10-clip-before-unscaling)",
    ),
    Bug("targets shifted twice", on_the_page("total_loss", shifted_twice), TOY),
    Bug("alpha forgotten", on_the_page("LoRALinear", AlphaForgotten), "`update_is_alpha_over_r`"),
    Bug("no warm-up", on_the_page("WARMUP", 0.0), "the logged rate"),
    Bug("B frozen", on_the_page("LoRALinear", FrozenB), "`ten_steps`"),
    Bug("a mean of means", on_the_page("total_loss", mean_of_means), EXERCISE),
    Bug("A and B in bf16", on_the_page("LoRALinear", InBf16), "`factors_stay_fp32`"),
)


def page_run(patches: Sequence[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Run the page under patches. Return the training losses, and the perplexities it reports."""
    losses: list[float] = []
    reported: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(one_page, name, value))
        for patch in patches:
            stack.enter_context(patch)
        total_loss = one_page.total_loss

        def recorded(model: one_page.GPT2, rows: Tensor) -> Tensor:
            loss = total_loss(model, rows)
            if model.training:
                losses.append(loss.item() / rows[:, 1:].numel())
            return loss

        def report(name: str, model: one_page.GPT2, validation: Tensor, tokenizer: object) -> None:
            if name == "adapter":
                reported[name] = math.exp(one_page.evaluate(model, validation))

        for name, value in {"total_loss": recorded, "report": report, "print": None}.items():
            stack.enter_context(mock.patch.object(one_page, name, value or no_line, create=True))
        one_page.main()
    return {"losses": losses, **reported}


def no_line(line: str) -> None:
    """Print nothing."""


def load_in_fp32(path: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def trained(bug: Bug | None, seed: int) -> dict[str, Any]:
    """Train with a bug, or without one. Return what the run shows, and what its user gets."""
    with TemporaryDirectory() as out:
        settings = SETTINGS | {"SEED": seed, "OUT": Path(out)}
        run = page_run(bug.switch() if bug else [], settings)
        used = run
        if bug:
            use = {"EPOCHS": 0, "LoRALinear": bug.layer_of_use, "load_file": load_in_fp32}
            use["save_adapter"] = lambda model: None  # keeps the adapter
            used = page_run([], settings | use)  # loads the adapter, and reports it
    found = {"losses": run["losses"], "shown": run["adapter"], "used": used["adapter"]}
    print(f"{bug.name if bug else 'right'}, seed {seed}: {found['shown']:.2f}, {found['used']:.2f}")
    return found


def measure() -> dict[str, Any]:
    right = [trained(None, seed) for seed in range(SEEDS)]
    return {"right": right, "bugs": {bug.name: trained(bug, 0) for bug in BUGS}}


def curve(run: dict[str, Any]) -> list[float]:
    """Return the means of BLOCKS equal parts of the training losses."""
    losses = run["losses"]
    size = max(1, len(losses) // BLOCKS)
    return [mean(losses[i : i + size]) for i in range(0, size * BLOCKS, size)][: len(losses)]


def distance(run: dict[str, Any], right: Sequence[dict[str, Any]]) -> float:
    """Return how far the run is from the mean of the right runs, in their standard deviations: the
    largest distance of a point of the curve, or of the validation loss at the end.
    """
    columns = zip(*map(points, right), strict=True)
    pairs = zip(points(run), columns, strict=True)
    return max(abs(value - mean(column)) / stdev(column) for value, column in pairs)


def limit(right: Sequence[dict[str, Any]]) -> float:
    """Return the largest distance of a right run from the other right runs."""
    runs = list(right)
    return max(distance(run, runs[:i] + runs[i + 1 :]) for i, run in enumerate(runs))


def points(run: dict[str, Any]) -> list[float]:
    return [*curve(run), math.log(run["shown"])]


def table(data: dict[str, Any]) -> str:
    """Return the table of docs/curves.md."""
    right = data["right"]
    shown = spread([run["shown"] for run in right])
    furthest = limit(right)
    lines = [
        "| curve | bug | the run shows | you get | distance | a curve tells it | told by |",
        "|---|---|---:|---:|---:|---|---|",
        f"| grey | none, {len(right)} seeds | {shown} | the same | up to {furthest:.1f} | | |",
    ]
    for letter, bug in zip("ABCDEFGHIJ", BUGS, strict=True):
        run = data["bugs"][bug.name]
        far = distance(run, right)
        told = "**yes**" if far > furthest else "no"
        numbers = f"{run['shown']:.1f} | {run['used']:.1f} | {far:.1f}"
        lines.append(f"| {letter} | {bug.name} | {numbers} | {told} | {bug.check} |")
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Any:
    """Draw each bug's curve over the band of the right runs, without the bug's name."""
    right = torch.tensor([curve(run) for run in data["right"]])  # (seeds, points)
    steps = len(data["right"][0]["losses"]) / right.size(1)
    x = [steps * (i + 0.5) for i in range(right.size(1))]
    figure, grid = subplots(2, 5, figsize=(PAGE_WIDTH, 4.8), sharex=True)
    caption = (
        f"Grey: the right program, the range of {len(right)} seeds, and seed 0 as a line, which an "
        "equal curve hides. Orange: the same program with one bug, seed 0. LoRA on all four layers "
        "of a block at rank 8, lr 8e-3, 4 windows of 128 tokens per step. Each point is the mean "
        "of 6 steps. The scales differ."
    )
    add_texts(
        figure,
        "The training loss with ten bugs, one in each panel: which can you tell? (mini)",
        caption,
    )
    for axis, letter, bug in zip(grid.flatten(), "ABCDEFGHIJ", BUGS, strict=True):
        axis.fill_between(x, right.amin(0), right.amax(0), color=BASE, alpha=0.3, linewidth=0)
        axis.plot(x, right[0], color=BASE, linewidth=1)
        axis.plot(x, curve(data["bugs"][bug.name]), ".-", color=LORA)
        axis.set_title(letter)
    for axis in grid[1]:
        axis.set_xlabel("step")
    for axis in grid[:, 0]:
        axis.set_ylabel("nats per token")
    return figure


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("curves", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
