"""List what `speed.py` measures: a task is one measurement, a plan the list of a round's tasks."""

from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks import ours
from training.options import Options

AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "growth": {
        "batch_size": (4, 8, 16, 32, 64),
        "block_size": (64, 128, 256, 512, 1024),
        "r": (1, 4, 16, 64),
    },
    "scaling": {"ranks": (1, 2, 4)},
}
SMALL_BATCH = 4  # while the block grows


@dataclass(frozen=True)
class Task:
    """Describe one measurement. `axis` is the field that differs from task to task."""

    kind: str  # a key of speed_worker's BASES or CALLS
    base: str
    device: str = "cpu"
    side: str = "ours"  # or theirs
    method: str = "lora"  # or full
    precision: str = "fp32"
    weights: str = "fp32"  # low: their frozen weights are in `precision`, and there is no autocast
    compile: bool = False
    graph: bool = True  # ours on CUDA: each part's kernels in one launch
    batch_size: int = 16
    block_size: int = 128
    r: int = 8
    ranks: int = 0  # data-parallel processes, of which this is one
    axis: str = ""
    matmuls: bool = False  # also the time that a step's matmuls take alone
    profile: bool = False  # one more step, for what a GPU's profiler and memory say of it
    warm_up: int = 1
    steps: int = 3

    @property
    def contender(self) -> str:
        """Name who computes what, such as "PEFT, LoRA, bf16 autocast"."""
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
        if not self.graph:
            how += ", no graph"
        return f"{who}, {what}, {how}"

    @property
    def name(self) -> str:
        if not self.axis:
            return self.contender
        return f"{self.contender}, {self.axis} {getattr(self, self.axis)}"

    def args(self) -> Options:
        """Return `train.py`'s options, for one step more than is timed, which may be profiled."""
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
            no_cuda_graph=not self.graph,
            **rank,
        )

    @property
    def autocast(self) -> str:
        if self.weights == "low":
            return "fp32"
        return self.precision

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets (B, T) of training's first batch, which every call has."""
        args = self.args()
        windows, _ = ours.data(args)
        first = windows.epoch_order(args.seed, 0)[: self.batch_size]
        return windows.batch(first)


def compare(opts: Namespace) -> list[Task]:
    """Return the tasks of one round, all sides."""
    compiled_or_not = (False, True) if opts.device == "cuda" else (False,)
    tasks = []
    for precision in opts.precision:
        task = replace(opts.task, precision=precision)
        for method, compiled in product(("lora", "full"), compiled_or_not):
            tasks += sides(replace(task, method=method, compile=compiled, matmuls=True))
        tasks += sides(replace(task, kind="evaluate"))
        tasks += sides(replace(task, kind="generate", steps=1, warm_up=0))  # it warms up itself
    return [task for task in tasks if task.kind in opts.only]


def sides(task: Task) -> list[Task]:
    """Return ours and theirs; theirs also with frozen weights in low precision, where it is low."""
    theirs = replace(task, side="theirs", matmuls=False)
    if task.precision == "fp32" or task.method != "lora" or task.compile:
        return [task, theirs]
    return [task, theirs, replace(theirs, weights="low")]


def along(opts: Namespace, part: str) -> list[Task]:
    """Return training tasks at each size that the base allows: for growth our LoRA and PEFT's, in
    bf16 if that is among the precisions; for scaling both of our methods, in the first precision.
    """
    precision = opts.precision[0]
    other = {"method": "full"}
    if part == "growth":
        other = {"side": "theirs"}
        if "bf16" in opts.precision:
            precision = "bf16"

    most = {"block_size": opts.config.n_positions, "r": opts.config.n_embd}
    if opts.device == "cuda":
        most["ranks"] = torch.cuda.device_count()

    tasks = []
    for axis, sizes in AXES[part].items():
        task = replace(opts.task, axis=axis, precision=precision)
        if axis == "block_size":
            task = replace(task, batch_size=SMALL_BATCH)
        for size in sizes:
            if size <= most.get(axis, size):
                sized = replace(task, **{axis: size})
                tasks += [sized, replace(sized, **other)]
    return tasks


def large(opts: Namespace) -> list[Task]:
    """Return tasks of LoRA on the base `opts.base`, in the first low precision."""
    low = [precision for precision in opts.precision if precision != "fp32"]
    precision = low[0] if low else "fp32"
    return sides(replace(opts.task, base=opts.base, precision=precision, batch_size=SMALL_BATCH))
