"""The device, the precision on it, and what they use."""

import ctypes
import os
import resource
import sys

import torch
from torch import Tensor, nn

from errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU. Raises UserError for one that is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
               "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        raise UserError(f"--device {name}: this machine or this build of torch has none; use cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, else fp16 on CUDA; fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensors of this process (mallopt(3)); elsewhere,
    nothing. By default large blocks go back to the kernel, and come again at a page fault every
    4 KB, which full fine-tuning waits for longest: its gradients are new at each step.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)  # large blocks from the heap as well,
        mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which matrix products run in `precision`; parameters stay as they are."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that a GPU makes while the CPU goes on, from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def cast_frozen(model: nn.Module, precision: str) -> None:
    """Hold the products' weights that are not trained in `precision`: autocast would cast them at
    every step.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(PRECISIONS[precision])


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, in MB (10^6 bytes): CUDA's allocator, else the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def total_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
