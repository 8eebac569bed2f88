"""Choose the device and the precision. `Device` casts tensors and copies them to the device."""

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from common.errors import UserError, first_line

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Files of NVIDIA's driver on Linux and in WSL. WSL's /dev/dxg would not do: any GPU has it.
NVIDIA_DRIVER = (Path("/proc/driver/nvidia"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


@dataclass(frozen=True)
class Device:
    """The device that a command computes on, and the precision of its matmuls.

    The precision has these effects:

    - `autocast` runs the matmuls of each forward and backward pass in it, also those with A and
      B. The loss in model/kernels, `GPT2.embed` and quantised layers ask autocast for its dtype.
    - A frozen base is loaded with its linear layers and embeddings in `dtype`, because autocast
      would otherwise cast them in each step (`load_base` in training/model.py).
    - In fp16, `grad_scaler` scales the loss, so that small gradients do not underflow, and skips
      steps with gradients that overflow. In other precisions, they end the run (`Meter`).

    The trained parameters with their gradients, AdamW, the norms, the sums of the residual stream,
    and the loss with its softmax stay in fp32. The softmax of attention is in the precision, if
    model/kernels/cpu.py computes it.
    """

    torch_device: torch.device
    precision: str

    @classmethod
    def pick(cls, device: str = "auto", precision: str = "auto", train: bool = False) -> "Device":
        """Resolve `auto`, and check that the device works.

        The device `auto` is CUDA if available, otherwise MPS, otherwise the CPU. On CUDA, the
        precision `auto` is bf16, or fp16 if the GPU lacks bf16. On a CPU with bf16 instructions,
        `auto` is bf16 in training. In all other cases, `auto` is fp32.

        Under torchrun, the GPU of this process becomes the current one before it is asked for its
        precision, because GPUs may differ.

        Raises UserError for a missing or broken device, and for training on MPS in fp16.
        """
        device = _pick_device(device)
        if train and device == "mps" and precision == "fp16":  # pytorch#186360
            raise UserError(
                "--precision fp16: on MPS, AdamW also takes the steps whose gradients "
                "overflowed; use bf16 or fp32"
            )
        if precision == "auto":
            precision = _pick_precision(device, train)
        return cls(torch.device(device), precision)

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def name(self) -> str:
        if self.is_cuda:
            return torch.cuda.get_device_name(self.torch_device)
        return self.torch_device.type

    def autocast(self) -> AbstractContextManager:
        """Return a context that runs matmuls in `precision`. Parameters stay unchanged."""
        if self.precision == "fp32":  # on MPS, torch 2.8 and 2.9 warn of an autocast to fp32
            return nullcontext()
        return torch.autocast(self.torch_device.type, self.dtype)

    def to_device(self, x: Tensor) -> Tensor:
        """Copy to the device. The copy to a CUDA GPU is asynchronous, from pinned memory."""
        if self.is_cuda and not x.is_cuda:
            return x.pin_memory().to(self.torch_device, non_blocking=True)
        return x.to(self.torch_device)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a scaler of the loss for fp16. In other precisions the scaler does nothing."""
        scaler = torch.amp.GradScaler(self.torch_device.type, enabled=self.precision == "fp16")
        # The first call of `scale` initialises the scaler. A process without windows would never
        # call `scale` during training, so call it here.
        scaler.scale(torch.zeros((), device=self.torch_device))
        return scaler

    def set_tf32(self, allowed: bool) -> None:
        """Set whether fp32 matmuls on CUDA may round their inputs to TF32's 10-bit mantissa. False
        also undoes a container's TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
        """
        torch.set_float32_matmul_precision("high" if allowed and self.is_cuda else "highest")

    def check_compiler(self) -> None:
        """Raise UserError if torch.compile does not work here."""
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=self.torch_device))
        except Exception as error:  # backends raise different exceptions
            reason = first_line(getattr(error, "inner_exception", error))
            raise UserError(
                f"--compile: needs a C++ compiler and, on a GPU, Python's headers ({reason})"
            ) from error

    @property
    def rng(self) -> ModuleType:
        """Return the Python module (`torch`, `torch.cuda` or `torch.mps`) that has this device's
        get_rng_state and set_rng_state."""
        modules = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}
        return modules[self.torch_device.type]

    def peak_memory_mb(self) -> float:
        """Return the peak memory so far, in 10^6 bytes. On CUDA, this is the peak of the CUDA
        allocator. On other devices, it is the peak of the process.
        """
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device) / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return peak * unit / 1e6


def _pick_device(asked: str) -> str:
    """Resolve `auto` to "cuda", "mps" or "cpu". Raises UserError if the device does not work."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    device = asked
    if asked == "auto":
        device = next(name for name, there in present.items() if there)
        if device == "cpu" and torch.version.cuda and any(p.exists() for p in NVIDIA_DRIVER):
            print(
                f"warning: torch cannot use the NVIDIA GPU, so the CPU computes; the driver may be "
                f"too old for CUDA {torch.version.cuda} (docs/howto.md)",
                file=sys.stderr,
            )
    if not present[device]:
        raise UserError(f"--device {device}: this machine or this torch has no {device}; use cpu")
    if device == "cuda":
        _take_gpu()
    return device


def _take_gpu() -> None:
    """Under torchrun, make the GPU of this process the current one. Raise UserError unless the
    current GPU runs a kernel, because a GPU may be full, or too old for torch.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"--nproc-per-node: this machine has {gpus} GPUs; use one process per GPU"
            )
        torch.cuda.set_device(local)
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        raise UserError(
            f"--device cuda: the GPU's first kernel fails ({first_line(error)}); use --device cpu, "
            "or, for a GPU older than Turing, torch from PyTorch's cu126 index"
        ) from error


def _pick_precision(device: str, train: bool) -> str:
    """Resolve `auto` by the rules of `Device.pick`."""
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp16"
    if device == "cpu" and train and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies in bf16 (AMX or AVX-512 bf16) without emulating it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tune_process(device: Device) -> None:
    """Configure the memory allocator, the attention kernel and fp32 matmuls of the process."""
    # By default, glibc returns large blocks to the kernel, and a new block costs a page fault per
    # 4 KiB (mallopt(3)). Full fine-tuning would lose the most time, because each step allocates new
    # gradients. With a GPU, the process would keep the memory that loading the base took.
    if sys.platform == "linux" and device.torch_device.type == "cpu":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # also take large blocks from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # never give the heap's memory back
    # On an H100 or B200, torch 2.11 and later prefer cuDNN's attention. Its gradients were NaN in
    # some runs (pytorch#196678, pocket-tts#264). A plan for a new shape can take it a second
    # (FunASR#3704), and each generated token has a new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device.set_tf32(False)
