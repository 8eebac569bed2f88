"""Write GGUF files: the form in which llama.cpp reads models and adapters.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch
from torch import Tensor

from storage.tensors import tensor_bytes

Value: TypeAlias = "str | bool | int | float | list[str] | list[int]"

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # each tensor's bytes start at a multiple of it
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
# The format's numbers for the types of metadata.
UINT32 = 4
INT32 = 5
FLOAT32 = 6
BOOL = 7
STRING = 8
ARRAY = 9


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a GGUF file, one tensor in memory at a time: matrices in `dtype`, vectors in fp32, as
    llama.cpp adds and multiplies them. Raises RunError for a number that is not finite.
    """
    dtypes = {name: dtype if x.ndim > 1 else torch.float32 for name, x in tensors.items()}
    header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    header += b"".join(_string(key) + _typed(value) for key, value in metadata.items())
    offset = 0
    for name, tensor in tensors.items():
        header += _tensor_info(name, tensor, dtypes[name], offset)
        size = tensor.numel() * dtypes[name].itemsize
        offset += size + -size % ALIGNMENT

    with open(path, "wb") as file:
        _write_padded(file, header)
        for name, tensor in tensors.items():
            _write_padded(file, tensor_bytes(name, tensor, dtypes[name]))


def _tensor_info(name: str, tensor: Tensor, dtype: torch.dtype, offset: int) -> bytes:
    """Return a tensor's entry in the header; its sizes stand there from the innermost outwards."""
    sizes = tensor.shape[::-1]
    return (
        _string(name)
        + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        + struct.pack("<IQ", DTYPES[dtype], offset)
    )


def _string(text: str) -> bytes:
    data = text.encode(errors="replace")  # a file's name may be no UTF-8
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    """Return a value of the metadata, after the number of its type."""
    if isinstance(value, list):
        if isinstance(value[0], str):
            items = b"".join(_string(str(item)) for item in value)
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + items
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    return struct.pack("<If", FLOAT32, value)


def _write_padded(file: BinaryIO, data: bytes | memoryview) -> None:
    file.write(data)
    file.write(bytes(-len(data) % ALIGNMENT))
