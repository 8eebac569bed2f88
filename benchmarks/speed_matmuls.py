"""The time that a training step's matmuls take alone: on a CPU no step can be shorter."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from benchmarks import ours
from benchmarks.speed_tasks import Task
from common.device import PRECISIONS
from model import fast
from model.cuda_loss import aligned
from model.gpt2 import GPT2Config
from model.weights import load_config

ENOUGH_SECONDS = 0.2  # of one matmul
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # an operand's shape and strides


class Matmuls(TorchDispatchMode):
    """Count the matmuls by their operands' shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Layout, ...]] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
            operands = tuple((tuple(t.shape), t.stride()) for t in args[-2:])
            self.found[operands] += 1
        return op(*args, **(kwargs or {}))


def count_matmuls(task: Task, config: GPT2Config) -> Counter[tuple[Layout, ...]]:
    """Count those of a training step, with LoRA on c_attn, by a step without memory or arithmetic.
    Attention's are counted whole, the masked half included.
    """
    with (
        torch.device("meta"),
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),  # meta has none
    ):
        model = ours.random_model(config, task.r if task.method == "lora" else None)
        ids = torch.zeros(task.batch_size, task.block_size, dtype=torch.long)
        with Matmuls() as seen:
            hidden = model.hidden(ids).flatten(0, 1)
            model.loss(hidden, ids.flatten()).backward()
    return seen.found


def measure_matmuls(task: Task, device: torch.device) -> float:
    """Return the seconds that a step's matmuls take, each in its shape and layout.

    On CUDA the head is padded, as `model/fast.py` does. There it is no bound: flash attention skips
    the masked half, and the products with A and B cost no more than their launches.
    """
    dtype = PRECISIONS[task.precision]
    config = load_config(Path(task.base))
    if device.type == "cuda":
        config = replace(config, vocab_size=aligned(config.vocab_size))
    total = 0.0
    for layouts, count in count_matmuls(task, config).items():
        a, b = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
            for shape, stride in layouts
        ]
        total += count * seconds_of(a, b)
    return total


def seconds_of(a: Tensor, b: Tensor) -> float:
    """Time a b by the faster of `matmul` and, for matrices, model/fast.py's `linear`."""
    names = {"torch": torch, "fast": fast, "a": a, "b": b, "out": a @ b}
    ways = ["torch.matmul(a, b, out=out)"]
    if a.dim() == 2:
        ways.append("fast.linear(a, b.mT)")

    seconds = []
    for way in ways:
        timer = Timer(way, globals=names, num_threads=torch.get_num_threads())
        seconds.append(timer.blocked_autorange(min_run_time=ENOUGH_SECONDS).median)
    return min(seconds)
