"""Write safetensors files: equal tensors and metadata give equal bytes.

Safetensors' writer orders the metadata at random, and before version 0.8 it copies all tensors
first. Format: 8 bytes of header length, the header in JSON, the tensors' bytes
(https://github.com/huggingface/safetensors).
"""

import ctypes
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file, one tensor in memory at a time. A `dtype` of None keeps each
    tensor's. Raises ValueError for a number that is not finite.
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
    """Return a tensor's numbers in `dtype`, as a file stores them.

    Raises ValueError, naming the tensor, for a number that is not finite.
    """
    value = tensor.detach().to("cpu", dtype).contiguous()
    if not is_finite(value):
        raise ValueError(f"{key} holds numbers that are not finite in {dtype}; not written")
    return ctypes.string_at(value.data_ptr(), value.nbytes)  # numpy may not be installed


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite: another one shows in the minimum or the maximum."""
    if tensor.numel() == 0:
        return True
    least, largest = tensor.aminmax()  # unlike torch.isfinite, it makes no second tensor
    return math.isfinite(least) and math.isfinite(largest)
