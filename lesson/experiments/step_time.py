"""Where does the time of a training step go? `python -m lesson.experiments.step_time`."""

from collections import Counter
from itertools import product
from statistics import mean

from torch.profiler import ProfilerActivity, profile, record_function

from common.device import Device, tune_process
from lesson.experiments.common import BLUE, GREY, RED, YELLOW, panels, parse, save, spread, trainer

# name: colour, and what is in the name of an operator of this part, or of one that calls it
PARTS = {
    "forward": (BLUE,),
    "input gradients": ("#66b2bd",),
    "weight gradients": (RED,),
    "A and B": ("#30343f",),
    "head and loss": (YELLOW, "_TiedCrossEntropy"),
    "attention": ("#a3a9ae", "scaled_dot", "ScaledDot", "bmm", "oftmax"),
    "optimizer": ("#8f2d56", "Optimizer.step", "_foreach"),
    "rest": (GREY,),
}
R, BLOCK, BATCH = 8, 128, 15  # 1,920 tokens: no layer is as wide, so that shapes tell all


def by_hand() -> dict[str, dict[str, list[float]]]:
    """Count operations a token, as docs/lora.md does: 2 a weight and matmul, and attention's."""
    config = trainer().model.config
    C, L, head = config.n_embd, config.n_layer, 2 * config.n_embd * config.vocab_size
    full = dict.fromkeys([*PARTS][:3], 2 * 12 * L * C * C)
    full |= {"head and loss": 3 * head, "attention": 12 * BLOCK * C * L}
    lora = full | {"weight gradients": 0, "head and loss": 2 * head, "A and B": 24 * R * C * L}
    return {
        f"by hand: {name}": {key: [count / sum(full.values())] for key, count in parts.items()}
        for name, parts in (("full", full), ("LoRA", lora))
    }


def part(path: list) -> str:
    """Name the part that an event's own time belongs to; `path` is it, and what called it."""
    event, names = path[0], " ".join(event.name for event in path)
    for key, (_, *words) in PARTS.items():
        if any(word in names for word in words):
            return key
    if event.name not in ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"):
        return "rest"
    first, second = event.input_shapes[event.name == "aten::addmm" :][:2]
    if R in (*first, *second):
        return "A and B"
    backward = "weight gradients" if first[-1] == BATCH * BLOCK else "input gradients"
    return backward if "Backward" in names else "forward"


def measured(precision: str, repeats: int) -> dict[str, dict[str, list[float]]]:
    sides = {
        name: trainer(name.lower(), precision=precision, block_size=BLOCK, batch_size=BATCH)
        for name in ("full", "LoRA")
    }
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for i, name in product(range(repeats + 1), sides):  # the first pair warms up
            with record_function(f"{name} {i}"):
                sides[name].step(next(sides[name].batches(i)))
    spent = Counter()  # by step and part
    for event in profiler.events():
        path = [event]
        while path[-1].cpu_parent:
            path.append(path[-1].cpu_parent)
        spent[path[-1].name, part(path)] += event.self_cpu_time_total
    return {
        f"{precision}: {name}": {
            key: [
                spent[f"{name} {i}", key] / sum(spent[f"full {i}", k] for k in PARTS)
                for i in range(1, repeats + 1)
            ]
            for key in PARTS
        }
        for name in sides
    }


def main(argv: list[str] | None = None) -> dict:
    args = parse(__doc__, argv)
    tune_process()
    data = by_hand()
    for precision in dict.fromkeys(("fp32", Device.pick("cpu", train=True).precision)):
        data |= measured(precision, 1 if args.short else 12)
    figure, (axis,) = panels("A training step by part (mini); full fine-tuning's is 100 %")
    left = [0.0] * len(data)
    for key, (colour, *_) in PARTS.items():
        widths = [100 * mean(parts.get(key, [0])) for parts in data.values()]
        bars = axis.barh([*data], widths, left=left, color=colour, label=key)
        axis.bar_label(
            bars,
            [f"{w:.0f}" * (w > 3) for w in widths],
            label_type="center",
            color="k" if colour == YELLOW else "w",
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, parts in data.items():
        totals = [100 * sum(step) for step in zip(*parts.values(), strict=True)]
        axis.text(mean(totals) + 1, row, f"{spread(totals, 0)} %", va="center")
    axis.set(xlim=(0, 120), ylim=(len(data) - 0.5, -0.5), xlabel="% of full's operations, or time")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return save(args, "step_time", data, figure)


if __name__ == "__main__":
    main()
