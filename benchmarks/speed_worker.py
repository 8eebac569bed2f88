"""Make one measurement of `speed.py` in a separate process: read a task as JSON, print figures.

Only tasks of their side import PEFT and transformers, because the imports would add memory to our
side.
"""

import json
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import ours
from benchmarks.speed_tasks import BASES, Task
from common.device import PRECISIONS, Device, tune_process, use_full_fp32
from common.errors import run_command
from data.windows import Batch
from model.gpt2 import GPT2
from model.sampling import generate
from storage.hub import MINI
from storage.weights import load_config, save_gpt2
from training.ranks import Ranks

# The last name is oneDNN's matmul. Matmuls inside a fused attention kernel are not counted.
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
PROMPT_TOKENS = 16
NEW_TOKENS = 256
WARM_UP_TOKENS = 8
Call = Callable[[], object]  # the timed call. Its value shows that both sides compute the same


def main(argv: Sequence[str] | None = None) -> None:
    warnings.simplefilter("ignore")  # libraries warn about each other
    [task_as_json] = sys.argv[1:] if argv is None else argv
    figures = json.dumps(measure(Task(**json.loads(task_as_json))))
    if os.environ.get("RANK", "0") == "0":
        print(figures)


def measure(task: Task) -> dict:
    """Return the figures of this task."""
    device = Device.pick(task.device, task.precision)
    use_full_fp32()  # for both sides
    if task.side == "ours" or task.allocator_alike:
        tune_process()  # as train.py, evaluate.py and generate.py do
    torch.manual_seed(0)
    if task.kind in BASES:
        make_base(task.kind, Path(task.base))
        return {}
    if task.ranks:
        return measure_rank(task, device)

    call = CALLS[task.kind](task, device)
    timed(call, task.warm_up, device)
    found = timed(call, task.steps, device)
    if task.profile:
        found |= profiled(call, device)
    return found


def make_base(name: str, directory: Path) -> None:
    """Save a base of random weights. gpt2-xl is in fp16 to save disk space."""
    config = BASES[name]
    dtype = torch.float16 if name == "gpt2-xl" else torch.float32
    save_gpt2(GPT2(config), directory, dtype)
    if name == "mini":  # mini's vocabulary differs from GPT-2's vocabulary
        for file in MINI.glob("tokenizer*.json"):
            shutil.copy(file, directory)


def timed(call: Call, times: int, device: Device) -> dict:
    """Return the seconds of each call, from an idle device until the device is idle again."""
    seconds = []
    for _ in range(times):
        wait_for(device)
        began = time.perf_counter()
        call()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds,
        "median": statistics.median(seconds or [0]),
        "peak_mb": device.peak_memory_mb(),
    }


def wait_for(device: Device) -> None:
    if device.torch_device.type != "cpu":
        torch.accelerator.synchronize()


def profiled(call: Call, device: Device) -> dict:
    """Profile one call. Return the time on the GPU in ms, the launches, the share of matmuls in the
    time, and the memory reserved so far on the GPU in MB.
    """
    reserved = 0.0
    if device.is_cuda:
        reserved = torch.cuda.max_memory_reserved() / 1e6
    with torch.profiler.profile() as profile:
        timed(call, 1, device)

    busy = 0.0
    launches = 0
    for event in profile.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not event.is_user_annotation:
            busy += event.self_device_time_total
        if event.key.startswith("cu") and "Launch" in event.key:
            launches += event.count

    found = {"reserved_mb": reserved, "busy_ms": busy / 1e3, "launches": launches}
    if device.torch_device.type != "mps":  # the profiler sees no kernels on MPS
        found["matmuls_share"] = matmuls_share(profile, device)
    return found


def matmuls_share(profile: torch.profiler.profile, device: Device) -> float:
    """Return the share of matmuls in the self time of all operations or, on CUDA, all kernels."""
    kind = "self_device_time_total" if device.is_cuda else "self_cpu_time_total"
    total = 0.0
    matmuls = 0.0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CPU:  # includes kernels' time
            own = getattr(event, kind)
            total += own
            if event.name in MATMULS:
                matmuls += own
    return matmuls / total


def build_theirs(task: Task, device: Device) -> Any:
    """Build transformers' model with its defaults and dropouts, and PEFT's adapter for LoRA."""
    from transformers import AutoModelForCausalLM

    from benchmarks.peft_loop import add_lora

    held = task.precision if task.weights == "low" else "fp32"
    model: Any = AutoModelForCausalLM.from_pretrained(task.base, dtype=PRECISIONS[held])
    if task.kind == "train" and task.method == "lora":
        model = add_lora(model, task.args())
    model.to(device.torch_device)
    if task.compile:
        return torch.compile(model)
    return model


def train(task: Task, device: Device) -> Call:
    """Return a training step of the task's side. Their side uses `make_step`, at a constant lr."""
    args = task.args()
    if task.side == "ours":
        trainer = ours.Trainer(args)
        batch = next(trainer.batches())
        return lambda: ours.step(trainer, batch)

    from benchmarks.peft_loop import make_step

    inputs, targets = task.batch()
    step = make_step(build_theirs(task, device), args, task.autocast)
    to = device.torch_device
    return lambda: step(inputs.to(to), targets.to(to), args.lr)


def evaluate(task: Task, device: Device) -> Call:
    """Return a call in which the task's side scores one batch."""
    text = task.text()
    size = task.batch_size
    if task.side == "ours":
        model = ours.load(Path(task.base), None, device)
        return lambda: ours.score(model, text, device, batch_size=size).loss

    from benchmarks.peft_loop import mean_loss

    model = build_theirs(task, device).eval()
    [(inputs, targets)] = text.evaluation_batches(size)
    inputs = inputs.to(device.torch_device)
    targets = targets.to(device.torch_device)

    @torch.no_grad()
    def score() -> float:
        return mean_loss(model, inputs, targets, task.autocast).item()

    return score


def write_text(task: Task, device: Device) -> Call:
    """Continue a prompt by NEW_TOKENS, or as far as the context allows. The call warms up."""
    inputs, _ = task.batch()
    prompt = inputs[0, :PROMPT_TOKENS].to(device.torch_device)
    make_writer = our_writer if task.side == "ours" else their_writer
    write = make_writer(task, device, prompt)
    most = min(NEW_TOKENS, load_config(Path(task.base)).n_positions - PROMPT_TOKENS)

    def in_precision(count: int = most) -> list[int]:
        with replace(device, precision=task.autocast).autocast():
            return write(count)

    in_precision(WARM_UP_TOKENS)
    return in_precision


def our_writer(task: Task, device: Device, prompt: Tensor) -> Callable[[int], list[int]]:
    model = ours.load(Path(task.base), None, device)
    return lambda count: list(generate(model, prompt, count, temperature=0))


def their_writer(task: Task, device: Device, prompt: Tensor) -> Callable[[int], list[int]]:
    model = build_theirs(task, device).eval()
    # Without an end token, no text ends early, and no logits processor has to prevent an end.
    model.generation_config.eos_token_id = None

    def write(count: int) -> list[int]:
        rows = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=model.config.vocab_size - 1,
        )
        return rows[0, PROMPT_TOKENS:].tolist()

    return write


CALLS: dict[str, Callable[[Task, Device], Call]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": write_text,
}


def measure_rank(task: Task, device: Device) -> dict:
    """Time a step of this rank on its share of the cores. Also time the communication alone."""
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // task.ranks))
    ranks = Ranks.from_environment()

    with ranks.joined(device.torch_device):
        trainer = ours.Trainer(task.args(), ranks)
        batch = next(trainer.batches())
        timed(lambda: step_of_rank(trainer, batch, ranks), task.warm_up - 1, device)
        sent = what_a_step_sends(trainer, batch, ranks)
        found = timed(lambda: step_of_rank(trainer, batch, ranks), task.steps, device)
        alone = timed(lambda: [dist.all_reduce(t) for t in sent], task.steps + 2, device)

    found["bytes"] = sum(tensor.nbytes for tensor in sent)
    if sent:
        found["all_reduce"] = alone["median"]
    return found


def step_of_rank(trainer: ours.Trainer, batch: Batch, ranks: Ranks) -> None:
    trainer.step(batch)
    ranks.max_over_ranks(0, 0)  # as `Run` does when no checkpoint is due


def what_a_step_sends(trainer: ours.Trainer, batch: Batch, ranks: Ranks) -> list[Tensor]:
    """Take a step. Return tensors of the shapes that the step passes to all_reduce."""
    all_reduce = dist.all_reduce
    sent = []

    def recorded(tensor: Tensor, *options: Any) -> None:
        sent.append(torch.zeros_like(tensor))
        all_reduce(tensor, *options)

    with mock.patch.object(dist, "all_reduce", recorded):
        step_of_rank(trainer, batch, ranks)
    return sent


if __name__ == "__main__":
    run_command(main)
