"""Reading safetensors files of any float type in NumPy, bf16 included."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

UNIT = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # of rounding
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `values` reads it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    size: int

    def raw(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)

    def values(self) -> Array:
        if self.dtype not in TYPES:
            raise ValueError(f"{self.path} is not a safetensors file of floats ({self.dtype})")
        raw = np.fromfile(self.path, TYPES[self.dtype], math.prod(self.shape), offset=self.start)
        if self.dtype == "BF16":  # the upper half of an fp32 number
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.reshape(self.shape).astype(np.float64)


def rounded(a: Array, dtype: str) -> Array:
    """Return the nearest numbers of a type, as fp64."""
    if dtype != "BF16":
        return a.astype(TYPES[dtype]).astype(np.float64)
    mantissa, exponent = np.frexp(a)  # 0.5 <= |mantissa| < 1
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def find(path: Path) -> dict[str, Stored]:
    """Return where each tensor of a file is stored. Raise ValueError for a damaged file."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(min(start - 8, length))
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {}
        for name, one in header.items():
            if not all(isinstance(n, int) for n in one["shape"]):
                raise ValueError(f"{name} has the shape {one['shape']}")
            begin, end = one["data_offsets"]
            if start + end > length:
                raise ValueError("it is cut short")
            dtype, shape = one["dtype"], tuple(one["shape"])
            if dtype in TYPES and np.dtype(TYPES[dtype]).itemsize * math.prod(shape) != end - begin:
                raise ValueError(f"{name} has {end - begin} bytes, not the shape {shape}")
            found[name] = Stored(path, dtype, shape, start + begin, end - begin)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file of floats ({error})") from error


def read(path: Path) -> dict[str, tuple[str, Array]]:
    """Return the type and the values of each tensor. Raise ValueError for a damaged file."""
    return {name: (one.dtype, one.values()) for name, one in find(path).items()}
