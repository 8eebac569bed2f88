"""Part of `verify_gpu.py`: describe the machine and the kernels of a training step."""

import subprocess
from argparse import Namespace
from collections.abc import Iterable

import torch
from torch.profiler import profile

from benchmarks import ours
from benchmarks.gpu_checks import options
from benchmarks.parity_report import Report, machine, versions

SLOWEST = 12  # kernels in the table


def describe(opts: Namespace, report: Report) -> None:
    """Describe the machine, the attention and the slowest kernels of a step in each precision."""
    report.facts |= {"machine": machine(), **versions(), "low precision": opts.low}
    if opts.device.is_cuda:
        report.facts |= describe_gpu()
    for precision in ("fp32", opts.low):
        with report.trying(f"kernels, {precision}"):
            describe_step(opts, precision, report)


def describe_gpu() -> dict[str, object]:
    card = torch.cuda.get_device_properties(0)
    driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    return {
        "GPUs": torch.cuda.device_count(),
        "compute capability": f"{card.major}.{card.minor}",
        "memory MB": card.total_memory // 10**6,
        "driver": driver.partition("\n")[0],
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "torch's kernels": " ".join(torch.cuda.get_arch_list()),
    }


def describe_step(opts: Namespace, precision: str, report: Report) -> None:
    """Profile one LoRA step with dropout, after a warm-up step. The step runs without a graph,
    because the profiler cannot tell which operation launched a kernel of a replayed graph.
    """
    trainer = ours.Trainer(options(opts, f"lora --precision {precision} --base-dropout 0.1"))
    batch = next(trainer.batches())
    ours.step(trainer, batch)
    with profile() as seen:
        ours.step(trainer, batch)

    events = seen.key_averages()
    report.facts[f"attention, {precision}"] = attention_kernel(event.key for event in events)
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    for kernel in kernels[:SLOWEST]:
        name = f"{precision}: {kernel.key:.80}"
        milliseconds = round(kernel.self_device_time_total / 1e3, 3)
        report.facts[name] = {"ms a step": milliseconds, "launches": kernel.count}


def attention_kernel(operations: Iterable[str]) -> str:
    """Return the name of PyTorch's attention operation, or "our own" if none has run."""
    for name in operations:
        if "::_scaled_dot_product" in name and not name.endswith("_backward"):
            return name
    return "our own"
