"""The device, the precision on it, and what they use."""

import os
import resource
import sys

import torch
from torch import nn

from errors import UserError

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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which matrix products run in `precision`; parameters stay as they are."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def cast_frozen(model: nn.Module, precision: str) -> None:
    """Hold the matrices that are not trained in `precision`: autocast casts them at every step."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
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
