"""Where does a training step spend its time? `python -m lesson.experiments.step_time`

LoRA saves the gradients of the weights, so a count of the operations predicts about two thirds of
the time of full fine-tuning. The measurement shows what the count leaves out.

Varied: the method, full fine-tuning and LoRA on c_attn at rank 8 in turn, and the precision, fp32
and the native precision of the CPU.
Fixed: mini, seed 0, without dropout, 12 pairs of steps, each on 15 windows of 128 tokens.
Measured: the time of each part of a step, by torch's profiler, relative to the full step of the
same pair, beside the operations counted by hand.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from statistics import mean
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from common.device import Device, tune_process
from common.figures import FULL, LORA
from lesson.experiments.common import as_command, experiment, panels, spread, trainer
from storage.hub import MINI
from storage.weights import load_config

Shares = dict[str, list[float]]  # by part, each step's share of the full step

PARTS = (
    "forward",
    "input gradients",
    "weight gradients",
    "A and B",
    "head and loss",
    "attention",
    "optimizer",
    "rest",
)
# Words that identify a part in the name of an operator or a caller. Shapes identify other parts.
NAMES = {
    "head and loss": ("_TiedCrossEntropy",),
    "attention": ("scaled_dot", "ScaledDot", "bmm", "oftmax"),
    "optimizer": ("Optimizer.step", "_foreach"),
}
MATMULS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")

R = 8
REPEATS = 12
BLOCK = 128
BATCH = 15  # 1,920 tokens differ from every layer's width, so shapes are not ambiguous


def by_hand() -> dict[str, Shares]:
    """Count operations per token, as in docs/speed.md: 2 per weight and matmul, and attention."""
    config = load_config(MINI)
    C = config.n_embd
    L = config.n_layer
    blocks = 2 * 12 * L * C * C
    head = 2 * C * config.vocab_size
    full = {
        "forward": blocks,
        "input gradients": blocks,
        "weight gradients": blocks,
        "head and loss": 3 * head,
        "attention": 12 * BLOCK * C * L,
    }
    lora = full | {"weight gradients": 0, "head and loss": 2 * head, "A and B": 24 * R * C * L}

    whole = sum(full.values())
    return {
        "by hand: full": {part: [count / whole] for part, count in full.items()},
        "by hand: LoRA": {part: [count / whole] for part, count in lora.items()},
    }


def part(path: list[Any]) -> str:
    """Return the part that the self time of an event belongs to. `path` is from `callers`."""
    event = path[0]
    names = " ".join(caller.name for caller in path)
    for key, words in NAMES.items():
        if any(word in names for word in words):
            return key
    if event.name not in MATMULS:
        return "rest"

    shapes = event.input_shapes
    if event.name == "aten::addmm":  # the first argument is the bias
        shapes = shapes[1:]
    first, second = shapes[:2]
    if R in first or R in second:
        return "A and B"
    if "Backward" not in names:
        return "forward"
    if first[-1] == BATCH * BLOCK:  # a sum over all tokens
        return "weight gradients"
    return "input gradients"


def callers(event: Any) -> list[Any]:
    """Return the event, its caller, the caller's caller, and so on."""
    path = [event]
    while path[-1].cpu_parent:
        path.append(path[-1].cpu_parent)
    return path


def measured(precision: str, repeats: int) -> dict[str, Shares]:
    """Time `repeats` pairs of steps. Return each method's shares."""
    sides = {
        name: trainer(name.lower(), precision=precision, block_size=BLOCK, batch_size=BATCH)
        for name in ("full", "LoRA")
    }
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for i, name in product(range(repeats + 1), sides):  # the first pair warms up
            with record_function(f"{name} {i}"):
                sides[name].step(next(sides[name].batches(i)))

    spent: Counter[tuple[str, str]] = Counter()  # microseconds by step and part
    for event in profiler.events() or ():
        path = callers(event)
        spent[path[-1].name, part(path)] += event.self_cpu_time_total
    return {f"{precision}: {name}": shares(spent, name, repeats) for name in sides}


def shares(spent: Counter[tuple[str, str]], name: str, repeats: int) -> Shares:
    """Return the share of each part in each step of a method, relative to the full step."""
    result: Shares = {key: [] for key in PARTS}
    for i in range(1, repeats + 1):
        whole = sum(spent[f"full {i}", key] for key in PARTS)
        for key in PARTS:
            result[key].append(spent[f"{name} {i}", key] / whole)
    return result


def draw(data: dict[str, Shares]) -> Any:
    """Draw the parts of both methods' steps, with a panel for each way of counting."""
    ways = list(dict.fromkeys(name.partition(": ")[0] for name in data))
    titles = []
    for way in ways:
        lora = data[f"{way}: LoRA"]
        totals = [100 * sum(step) for step in zip(*lora.values(), strict=True)]
        what = "operations, by hand" if way == "by hand" else f"time in {way}"
        titles.append(f"{what}:\nLoRA {spread(totals, 0)} % of full")
    count = len(data[f"{ways[-1]}: full"]["forward"])
    figure, axes = panels(
        "The parts of a training step, in % of a step of full fine-tuning (mini)",
        f"LoRA on c_attn at rank {R}, {BATCH} windows of {BLOCK} tokens per step. Time: means of "
        f"{count} pairs of steps, with the range in brackets.",
        *titles,
        height=5.4,
    )
    for axis, way in zip(axes, ways, strict=True):
        draw_pairs(axis, data[f"{way}: full"], data[f"{way}: LoRA"])
    widest = max(axis.dataLim.xmax for axis in axes)
    for axis in axes:
        axis.set_xlim(0, 1.25 * widest)  # space for a number and a method's name
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    return figure


def draw_pairs(axis: Any, full: Shares, lora: Shares) -> None:
    """Draw two bars for each part. The first pair shows the methods' names."""
    for name, shares_of, colour, shift in (("full", full, FULL, -0.2), ("LoRA", lora, LORA, 0.2)):
        widths = [100 * mean(shares_of.get(key, [0])) for key in PARTS]
        rows = [row + shift for row in range(len(PARTS))]
        labels = [
            f"{width:.0f}" if key in lora else "not counted"
            for key, width in zip(PARTS, widths, strict=True)
        ]
        labels[0] += f"  {name}"
        bars = axis.barh(rows, widths, 0.36, color=colour)
        axis.bar_label(bars, labels, padding=3, fontsize=9)
    axis.set(ylim=(len(PARTS) - 0.4, -0.6), xlabel="%")
    axis.set_yticks(range(len(PARTS)), PARTS)
    axis.grid(visible=False, axis="y")


def measure() -> dict[str, Shares]:
    device = Device.pick("cpu", train=True)
    tune_process(device)
    data = by_hand()
    for precision in dict.fromkeys(("fp32", device.precision)):  # only once if they are equal
        data |= measured(precision, REPEATS)
    return data


def main(argv: Sequence[str] | None = None) -> dict:
    return experiment("step_time", measure, draw, __doc__, argv)


if __name__ == "__main__":
    as_command(main)
