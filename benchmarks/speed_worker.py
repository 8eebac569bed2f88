"""One measurement of `speed.py`, in a process of its own: a task as JSON in, its figures out.

PEFT and transformers are imported only where they are measured: their memory is not ours.
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from model.plain import plain_operations
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from benchmarks import ours
from common.device import PRECISIONS, Device, tune_process
from common.errors import run_command
from lora.inject import inject
from lora.layer import LoRAConfig
from model import fast as ops
from model.gpt2 import GPT2, GPT2Config
from model.sampling import generate
from model.weights import load_config, save_gpt2
from training.options import Options
from training.ranks import Ranks

BASES = {
    "base": (GPT2Config(), torch.float32),
    "gpt2-xl": (GPT2Config(n_embd=1600, n_layer=48, n_head=25), torch.float16),
}
PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 16, 256, 8
ENOUGH_SECONDS = 0.2  # of one matmul
Call = Callable[[], object]  # what is timed; its value shows that both sides computed the same


@dataclass(frozen=True)
class Task:
    """Describe one measurement. `axis` is the field that differs from task to task."""

    kind: str  # a key of BASES or CALLS
    base: str
    device: str = "cpu"
    side: str = "ours"  # or theirs
    method: str = "lora"  # or full
    precision: str = "fp32"
    weights: str = "fp32"  # low: their frozen weights are in `precision`, and there is no autocast
    compile: bool = False
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
        what = self.method.replace("lora", "LoRA") if self.kind == "train" else self.kind
        who, how = "PEFT" if what == "LoRA" else "transformers", ""
        if self.side == "ours":
            who = "this project"
        elif self.precision != "fp32":
            how = " weights" if self.weights == "low" else " autocast"
        return f"{who}, {what}, {self.precision}{how}{', compiled' * self.compile}"

    @property
    def name(self) -> str:
        return self.contender + (f", {self.axis} {getattr(self, self.axis)}" if self.axis else "")

    def args(self) -> Options:
        """Return `train.py`'s options, for one step more than is timed, which may be profiled."""
        return ours.options(
            self.method,
            "--base",
            self.base,
            "--device",
            self.device,
            "--precision",
            self.precision,
            "--batch-size",
            self.batch_size,
            "--block-size",
            self.block_size,
            "--max-steps",
            self.warm_up + self.steps + 1,
            *["--compile"] * self.compile,
            *(["--r", self.r] if self.method == "lora" else []),
        )

    @property
    def autocast(self) -> str:
        return "fp32" if self.weights == "low" else self.precision

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets (B, T) of training's first batch, which every call has."""
        args = self.args()
        windows, _ = ours.data(args)
        return windows.batch(windows.epoch_order(args.seed, 0)[: self.batch_size])


def main(argv: Sequence[str] | None = None) -> None:
    warnings.simplefilter("ignore")  # the libraries', about each other
    task = Task(**json.loads((argv or sys.argv[1:])[0]))
    figures = json.dumps(measure(task))
    if os.environ.get("RANK", "0") == "0":
        print(figures)


def measure(task: Task) -> dict:
    """Return the figures of this task."""
    device = Device.pick(task.device, task.precision)
    if task.side == "ours":
        tune_process()  # as train.py, evaluate.py and generate.py do
    torch.manual_seed(0)
    if task.kind in BASES:  # of random weights: speed does not depend on their values
        config, dtype = BASES[task.kind]
        model = GPT2(config)
        save_gpt2(model, Path(task.base), dtype)
        return {}
    if task.ranks:
        return measure_rank(task, device)
    call = CALLS[task.kind](task, device)
    timed(call, task.warm_up, device)
    found = timed(call, task.steps, device)
    if task.profile:
        found |= profiled(call, device)
    if task.matmuls:
        found["matmul_seconds"] = measure_matmuls(task, device.torch_device)
    return found


def timed(call: Call, times: int, device: Device) -> dict:
    """Return the seconds of each call, from an idle device until it is idle again."""
    wait = torch.accelerator.synchronize if device.torch_device.type != "cpu" else lambda: None
    seconds = []
    for _ in range(times):
        wait()
        began = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds,
        "median": statistics.median(seconds or [0]),
        "peak_mb": device.peak_memory_mb(),
    }


def profiled(call: Call, device: Device) -> dict:
    """Return the memory reserved so far, MB, and one call's time on the GPU, ms, and launches."""
    reserved = torch.cuda.max_memory_reserved() / 1e6 if device.is_cuda else 0.0
    with torch.profiler.profile() as profile:
        timed(call, 1, device)
    events = profile.key_averages()
    busy = sum(
        e.self_device_time_total
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    )
    launches = sum(e.count for e in events if e.key.startswith("cu") and "Launch" in e.key)
    return {"reserved_mb": reserved, "busy_ms": busy / 1e3, "launches": launches}


def build_theirs(task: Task, device: Device) -> nn.Module:
    """Build transformers' model by its defaults, dropouts included; for LoRA with PEFT's."""
    from transformers import AutoModelForCausalLM

    from benchmarks.peft_loop import add_lora

    held = task.precision if task.weights == "low" else "fp32"
    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=PRECISIONS[held])
    if (task.kind, task.method) == ("train", "lora"):
        model = add_lora(model, task.args())
    model.to(device.torch_device)
    return torch.compile(model) if task.compile else model


def train(task: Task, device: Device) -> Call:
    """Return either side's step; theirs is the loop that users write, its rate as it is."""
    args = task.args()
    if task.side == "ours":
        trainer = ours.make_trainer(args)
        batch = next(trainer.batches())
        return lambda: ours.step(trainer, batch)
    from benchmarks.peft_loop import make_step

    batch = task.batch()
    step = make_step(build_theirs(task, device), args, task.autocast)
    return lambda: step(*(x.to(device.torch_device) for x in batch), args.lr)


def evaluate(task: Task, device: Device) -> Call:
    inputs, targets = task.batch()
    if task.side == "ours":
        base = Path(task.base)
        model, tokenizer = ours.load(base, None, device), ours.tokenizer(base)
        return lambda: ours.score(model, [(inputs, targets)], tokenizer, device).loss
    from benchmarks.peft_loop import mean_loss

    model = build_theirs(task, device).eval()
    inputs, targets = inputs.to(device.torch_device), targets.to(device.torch_device)
    return torch.no_grad()(lambda: mean_loss(model, inputs, targets, task.autocast).item())


def write_text(task: Task, device: Device) -> Call:
    """Continue a prompt by NEW_TOKENS, or as many as the base sees; warms up by itself."""
    ids = task.batch()[0][0, :PROMPT_TOKENS].to(device.torch_device)
    most = min(NEW_TOKENS, load_config(Path(task.base)).n_positions - PROMPT_TOKENS)
    if task.side == "ours":
        model = ours.load(Path(task.base), None, device)
    else:
        model = build_theirs(task, device).eval()
        model.generation_config.eos_token_id = None  # no end, and no processor that forbids it

    def write(count: int = most) -> list[int]:
        with replace(device, precision=task.autocast).autocast():
            if task.side == "ours":
                return list(generate(model, ids, count, temperature=0))
            return model.generate(
                ids[None],
                attention_mask=torch.ones_like(ids)[None],
                do_sample=False,
                max_new_tokens=count,
                pad_token_id=model.config.vocab_size - 1,
            )[0, PROMPT_TOKENS:].tolist()

    write(WARM_UP_TOKENS)
    return write


CALLS = {"train": train, "evaluate": evaluate, "generate": write_text}


def measure_rank(task: Task, device: Device) -> dict:
    """Time a step of this rank, which has its share of the cores, and what it sends by itself."""
    torch.set_num_threads(max(1, os.cpu_count() // task.ranks))
    ranks, all_reduce, sent = Ranks.of_torchrun(), dist.all_reduce, []

    def recorded(tensor: Tensor, *options: object) -> None:
        sent.append(torch.zeros_like(tensor))
        all_reduce(tensor, *options)

    def step() -> None:
        trainer.step(batch)
        ranks.max_over_ranks(False)  # as `Session.after_step` does when nothing is due
        ranks.max_over_ranks(0)

    with ranks.joined(device.torch_device):
        trainer = ours.make_trainer(task.args(), ranks)
        batch = next(trainer.batches())
        timed(step, task.warm_up - 1, device)
        with mock.patch.object(dist, "all_reduce", recorded):
            step()
        found = timed(step, task.steps, device)
        alone = timed(lambda: [all_reduce(t) for t in sent], task.steps + 2, device)
    found["bytes"] = sum(t.nbytes for t in sent)
    return found | ({"all_reduce": alone["median"]} if sent else {})


class Matmuls(TorchDispatchMode):
    """Count the matmuls by their operands' shapes and strides."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
            self.found[tuple((tuple(t.shape), t.stride()) for t in args[-2:])] += 1
        return op(*args, **(kwargs or {}))


def count_matmuls(task: Task, config: GPT2Config) -> Counter:
    """Count those of a training step, with LoRA on c_attn, by a step without memory or arithmetic.
    Attention's are counted whole, the masked half included.
    """
    with (
        torch.device("meta"),
        plain_operations(),
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: False),
    ):  # meta has none
        model = GPT2(config)
        if task.method == "lora":
            inject(model, LoRAConfig(r=task.r, target_modules=("c_attn",)))
        ids = torch.zeros(task.batch_size, task.block_size, dtype=torch.long)
        with Matmuls() as seen:
            hidden = model.hidden(ids).flatten(0, 1)
            ops.tied_cross_entropy(hidden, model.wte.weight, ids.flatten()).backward()
    return seen.found


def measure_matmuls(task: Task, device: torch.device) -> float:
    """Return the seconds that a step's matmuls take alone: no step can be shorter. Each is timed
    in its shape and layout, by the faster of `matmul` and model/fast.py's `linear`.
    """
    total = 0.0
    for shapes, count in count_matmuls(task, load_config(Path(task.base))).items():
        a, b = (
            torch.empty_strided(*shape, dtype=PRECISIONS[task.precision], device=device).normal_()
            for shape in shapes
        )
        names = {"torch": torch, "ops": ops, "a": a, "b": b, "out": a @ b}
        ways = ["torch.matmul(a, b, out=out)", "ops.linear(a, b.mT)"][: 4 - a.dim()]
        total += count * min(
            Timer(way, globals=names, num_threads=torch.get_num_threads())
            .blocked_autorange(min_run_time=ENOUGH_SECONDS)
            .median
            for way in ways
        )
    return total


if __name__ == "__main__":
    run_command(main)
