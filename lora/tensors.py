"""Read tensors strictly, and write safetensors files. Equal content gives equal bytes.

This file does not use `safetensors.torch.save_file`, because it needs numpy, which PyTorch does not
install, and writes the metadata in a random order.

A safetensors file contains the length of the header in 8 bytes, the header in JSON, and the bytes
of the tensors (https://github.com/huggingface/safetensors).
"""

import ctypes
import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
POINTER = b"version https://git-lfs"  # git clone without git-lfs leaves pointers to files


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file. Tensors are copied one at a time, to save memory. A `dtype` of None
    keeps the dtype of each tensor. Raises ValueError for a number that is not finite.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        stored = dtype or tensor.dtype
        begin = end
        end = begin + tensor.numel() * stored.itemsize
        header[key] = {
            "dtype": DTYPES[stored],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes

    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in tensors.items():
            file.write(tensor_bytes(key, tensor, dtype or tensor.dtype))


def tensor_bytes(key: str, tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Return a tensor's bytes in `dtype`. Raises ValueError for a number that is not finite, and
    for a tensor of which this process has only a part."""
    if hasattr(tensor, "full_tensor"):  # a DTensor
        raise ValueError(f"{key} is sharded; call `unshard` on each FSDPModule before saving")
    value = tensor.detach().to("cpu", dtype).contiguous()
    if not is_finite(value):
        raise ValueError(f"{key} contains numbers that are not finite in {dtype}; not written")
    return ctypes.string_at(value.data_ptr(), value.nbytes)  # works without numpy


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors header. Raises ValueError if the file is not a
    safetensors file."""
    with readable(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of the file or of safetensors into a ValueError that names the file. Other
    errors, such as too little memory, pass unchanged."""
    try:
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ValueError(f"{path}: is a pointer of git-lfs, not the file; run git lfs pull")
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error for a file that its reader refuses."""
    reason = ascii(str(error).strip().partition("\n")[0][:120])  # may quote the file
    return ValueError(f"{path}: damaged, or not a file of tensors ({reason})")


def check_names(path: Path, stored: Collection[str], needed: Collection[str]) -> None:
    """Raise ValueError, naming a tensor, unless the `stored` names equal the `needed` names."""
    missing = sorted(set(needed) - set(stored))
    if missing:
        raise ValueError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); "
            "the file belongs to another model"
        )
    extra = sorted(set(stored) - set(needed))
    if extra:
        raise ValueError(
            f"{path}: unexpected tensor {extra[0]!r:.120}; the file belongs to another model"
        )


def checked(value: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return a tensor of `shape` from a file. Raises ValueError for NaN, inf or another shape."""
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} is not a tensor of fp32, fp16 or bf16 ({value.dtype})")
    if value.shape != shape:
        found = f"{tuple(value.shape)!s:.120}"
        raise ValueError(f"{name} has shape {found}, not {tuple(shape)}")
    if not is_finite(value):
        raise ValueError(f"{name} contains numbers that are not finite; the file is damaged")
    return value


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite. A NaN or inf would show in the minimum or maximum."""
    if tensor.numel() == 0:
        return True
    least, largest = tensor.aminmax()  # torch.isfinite would make a second tensor
    return math.isfinite(least) and math.isfinite(largest)
