"""Choose the device and its precision: one object that knows its autocast, casts and copies."""

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from common.errors import UserError, first_line

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@dataclass(frozen=True)
class Device:
    """Where a command computes, and in which precision its matmuls run."""

    torch_device: torch.device
    precision: str

    @classmethod
    def pick(cls, device: str = "auto", precision: str = "auto", train: bool = False) -> "Device":
        """Resolve `auto`. The device is CUDA, else MPS, else the CPU. The precision is bf16 on
        CUDA, or fp16 where the GPU lacks bf16; bf16 to train on a CPU with bf16 instructions; else
        fp32. Raises UserError for a device that is missing or runs no kernel, and for training on
        MPS in fp16.
        """
        asked, present = (
            device,
            {
                "cuda": torch.cuda.is_available(),
                "mps": torch.backends.mps.is_available(),
                "cpu": True,
            },
        )
        if device == "auto":
            device = next(name for name, there in present.items() if there)
        if not present[device]:
            raise UserError(
                f"--device {device}: this machine or this build of torch has none; use cpu"
            )
        if device == "cuda" and (failure := _first_kernel_fails()):
            old = "no kernel image" in failure
            reason = f"the GPU's first kernel fails ({failure})"
            if old:
                reason += "; a GPU older than Turing needs torch from PyTorch's cu126 index"
            if asked == "cuda" or not old:  # a full or busy GPU is no reason to train for hours
                raise UserError(f"--device cuda: {reason}")
            print(f"warning: the CPU is used: {reason}", file=sys.stderr)
            device = "cpu"
        if train and (device, precision) == ("mps", "fp16"):  # pytorch#186360
            raise UserError(
                "--precision fp16: on MPS, AdamW also takes the steps whose gradients "
                "overflowed; use bf16 or fp32"
            )
        if precision == "auto" and device == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if bf16 else "fp16"
        elif precision == "auto":
            precision = "bf16" if train and device == "cpu" and _cpu_has_bf16() else "fp32"
        return cls(torch.device(device), precision)

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def name(self) -> str:
        return (
            torch.cuda.get_device_name(self.torch_device)
            if self.is_cuda
            else self.torch_device.type
        )

    def autocast(self) -> AbstractContextManager:
        """Return a context in which matmuls run in `precision`; parameters stay as they are."""
        if self.precision == "fp32":  # on MPS, torch 2.8 and 2.9 warn of an autocast to fp32
            return nullcontext()
        return torch.autocast(self.torch_device.type, self.dtype)

    def copy(self, x: Tensor) -> Tensor:
        """Copy to the device; to a CUDA GPU from pinned memory, while the CPU goes on."""
        if self.is_cuda:
            return x.pin_memory().to(self.torch_device, non_blocking=True)
        return x.to(self.torch_device)

    def place(self, model: nn.Module) -> nn.Module:
        """Move the model to the device. Cast its frozen matrices to `precision` once: autocast
        would cast them again at every step.
        """
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.requires_grad:
                module.to(self.dtype)
        return model.to(self.torch_device)

    def set_tf32(self, allowed: bool) -> None:
        """Let fp32 matmuls on CUDA round their inputs to TF32's 10 bits of mantissa, or not."""
        if self.is_cuda:
            torch.set_float32_matmul_precision("high" if allowed else "highest")

    def check_compiler(self) -> None:
        """Raise UserError if torch.compile does not work here."""
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=self.torch_device))
        except Exception as error:  # each backend has exceptions of its own
            raise UserError(
                "--compile: needs a C++ compiler and, on a GPU, Python's headers "
                f"({first_line(getattr(error, 'inner_exception', error))})"
            ) from error

    @property
    def random(self) -> ModuleType:
        """Return the module whose get_rng_state and set_rng_state are for this device."""
        return {"cuda": torch.cuda, "mps": torch.mps}.get(self.torch_device.type, torch)

    def peak_memory_mb(self) -> float:
        """Return the peak memory so far in 10^6 bytes, of CUDA's allocator or else the process."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device) / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _first_kernel_fails() -> str:
    """Return why a first kernel fails, or "": a wheel of torch has kernels for some GPUs only."""
    gpu = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()  # this rank's
    try:
        torch.ones(1, device=f"cuda:{gpu}").add(1).item()
    except RuntimeError as error:
        return first_line(error)
    return ""


def _cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies in bf16 (AMX or AVX-512 bf16); else it is emulated."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tune_process() -> None:
    """Apply the process-wide settings with which our commands run fastest."""
    # By default glibc gives large blocks back to the kernel, and a fresh one costs a page fault
    # every 4 KiB (mallopt(3)). Full fine-tuning, with new gradients at each step, waits longest.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)  # take large blocks from the heap as well,
        mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks
    # On an H100 or B200, torch 2.11 to 2.13 prefer cuDNN, which plans for every new shape: in
    # generation, at each token (transformers#48163).
    torch.backends.cuda.enable_cudnn_sdp(False)
