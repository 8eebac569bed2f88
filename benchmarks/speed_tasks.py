"""List the tasks of `speed.py`. A task is one measurement. A plan has the tasks of a round."""

import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks import ours
from data.windows import Windows
from model.gpt2 import GPT2, GPT2Config
from training.options import Options

# Bases of random weights, from small to large. Speed does not depend on the values of weights.
BASES = {
    "mini": GPT2Config(vocab_size=8192, n_positions=256, n_embd=256, n_layer=6, n_head=4),
    "base": GPT2Config(),  # 124M
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "growth": {
        "batch_size": (4, 8, 16, 32, 64),
        "block_size": (128, 256, 512, 1024),
        "r": (1, 4, 16, 64),
    },
    "scaling": {"ranks": (1, 2, 4)},
}
SMALL_BATCH = 4  # for growth by block_size or parameters


@dataclass(frozen=True)
class Task:
    """One measurement. `axis` is the field that varies between tasks."""

    kind: str  # a key of BASES, to make that base, or a key of CALLS in speed_worker
    base: str
    device: str = "cpu"
    side: str = "ours"  # or theirs
    method: str = "lora"  # or full
    precision: str = "fp32"
    weights: str = "fp32"  # low: their frozen weights are in `precision`, without autocast
    allocator_alike: bool = False  # their side keeps freed memory, as in tune_process
    compile: bool = False
    batch_size: int = 16
    block_size: int = 128
    r: int = 8
    ranks: int = 0  # number of data-parallel processes
    parameters: int = 0  # of the base, if the base varies by task
    axis: str = ""
    profile: bool = False  # run one more step under the profiler
    warm_up: int = 1
    steps: int = 3

    @property
    def contender(self) -> str:
        """Name the contender, such as "PEFT, LoRA, bf16 autocast"."""
        what = self.kind
        if self.kind == "train":
            what = self.method.replace("lora", "LoRA")

        who = "this project"
        how = self.precision
        if self.side == "theirs":
            who = "PEFT" if what == "LoRA" else "transformers"
            if self.precision != "fp32":
                how += " weights" if self.weights == "low" else " autocast"
        if self.compile:
            how += ", compiled"
        if self.allocator_alike:
            how += ", allocator alike"
        return f"{who}, {what}, {how}"

    @property
    def name(self) -> str:
        if not self.axis:
            return self.contender
        return f"{self.contender}, {self.axis} {getattr(self, self.axis):,}"

    def args(self) -> Options:
        """Return `train.py`'s options, for the timed steps and one step to profile."""
        rank: dict[str, object] = {"r": self.r} if self.method == "lora" else {}
        return ours.options(
            self.method,
            base=self.base,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            block_size=self.block_size,
            max_steps=self.warm_up + self.steps + 1,
            compile=self.compile,
            **rank,
        )

    @property
    def autocast(self) -> str:
        if self.weights == "low":
            return "fp32"
        return self.precision

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets (B, T) of the first training batch, for every call."""
        args = self.args()
        windows, _ = ours.data(args)
        first = windows.epoch_order(args.seed, 0)[: self.batch_size]
        return windows.batch(first)

    def text(self) -> Windows:
        """Return one batch of windows from the start of the book, for every call to score."""
        windows, _ = ours.data(self.args())
        length = self.batch_size * self.block_size + 1
        counts = windows.byte_counts
        assert counts is not None
        block = self.block_size
        return Windows(windows.tokens[:length], block, block, byte_counts=counts[:length])


def compare(opts: Namespace) -> list[Task]:
    """Return the tasks of one round, for all sides."""
    compiled_or_not = (False, True) if opts.device == "cuda" else (False,)
    tasks = []
    for precision in opts.precision:
        task = replace(opts.task, precision=precision)
        for method, compiled in product(("lora", "full"), compiled_or_not):
            tasks += sides(replace(task, method=method, compile=compiled, profile=True))
        tasks += sides(replace(task, kind="evaluate"))
        tasks += sides(replace(task, kind="generate", steps=1, warm_up=0))  # the call warms up
    return [task for task in tasks if task.kind in opts.only]


def parameters(config: GPT2Config) -> int:
    with torch.device("meta"):  # without memory for the weights
        return sum(parameter.numel() for parameter in GPT2(config).parameters())


def sides(task: Task) -> list[Task]:
    """Return the tasks of both sides. In low precision, their side also runs with frozen weights in
    that precision. Each task of their side also runs with our allocator setting.
    """
    theirs = [replace(task, side="theirs")]
    if task.precision != "fp32" and task.method == "lora" and not task.compile:
        theirs.append(replace(theirs[0], weights="low"))
    if tunes_allocator(task.device):
        theirs += [replace(each, allocator_alike=True) for each in theirs]
    return [task, *theirs]


def tunes_allocator(device: str) -> bool:
    """Return whether `tune_process` changes the allocation of this device's memory."""
    return device == "cpu" and sys.platform == "linux"


def along(opts: Namespace, part: str) -> list[Task]:
    """Return training tasks at each size that the base allows.

    Growth compares our LoRA with PEFT, with the same allocator setting. The precision is bf16 if
    `opts.precision` contains bf16, and otherwise the first precision. Growth also varies the base,
    over `opts.models`. Scaling runs our LoRA and our full fine-tuning in the first precision.
    """
    axes = dict(AXES[part])
    first = replace(opts.task, precision=opts.precision[0])
    other: dict[str, object] = {"method": "full"}
    if part == "growth":
        axes["parameters"] = tuple(sorted(opts.models))
        first = replace(first, warm_up=1)  # steps are long and numerous
        other = {"side": "theirs", "allocator_alike": tunes_allocator(opts.device)}
        if "bf16" in opts.precision:
            first = replace(first, precision="bf16")

    most = {"block_size": opts.config.n_positions, "r": opts.config.n_embd}
    if opts.device == "cuda":
        most["ranks"] = torch.cuda.device_count()

    tasks = []
    for axis, sizes in axes.items():
        task = replace(first, axis=axis)
        if axis in ("block_size", "parameters"):
            task = replace(task, batch_size=SMALL_BATCH)
        for size in sizes:
            if axis == "parameters":
                task = replace(task, base=opts.models[size])
            if size <= most.get(axis, size):
                sized = replace(task, **{axis: size})
                tasks += [sized, replace(sized, **other)]
    return tasks
