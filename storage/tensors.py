"""Read files of tensors, strictly, and write them: models, adapters and checkpoints."""

import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import RunError, UserError, first_line
from common.files import brief, open_file

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_tensors(
    path: Path,
    shapes: Mapping[str, Collection[int]],
    optional: Collection[str] = (),
    unread: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors named in `shapes` one by one, each in the precision of the file.

    The file is `.safetensors`, or else what torch.save wrote. Raises UserError, naming the tensor,
    if one is missing (unless in `optional`), unexpected (unless in `unread`), of another shape, not
    of floating point or not finite. Names are checked before the first tensor is read.
    """
    stored, read = _open(path)
    missing = sorted(shapes.keys() - stored.keys() - set(optional))
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); "
            "the file is of another model"
        )
    extra = sorted(stored.keys() - shapes.keys() - set(unread))
    if extra:
        raise UserError(
            f"{path}: unexpected tensor {extra[0]!r:.120}; the file is of another model"
        )
    for key, shape in shapes.items():
        if key in stored:
            with _naming(path, key):
                value = read(key)
            yield key, _checked(value, torch.Size(shape), f"{path}: {key}")


def _checked(value: object, shape: torch.Size, name: str) -> Tensor:
    """Return a tensor from a file. Raises UserError unless it is dense, finite and of `shape`."""
    kind = getattr(value, "dtype", type(value).__name__)
    if not isinstance(value, Tensor) or kind not in DTYPES:
        raise UserError(f"{name} is not a tensor of fp32, fp16 or bf16 ({kind})")
    if value.layout != torch.strided or value.is_meta:  # torch.load can return these
        raise UserError(f"{name} is sparse or holds no data; save it as a dense tensor")
    if value.shape != shape:
        raise UserError(f"{name} is {brief(tuple(value.shape))} where {tuple(shape)} is needed")
    if not _is_finite(value):
        raise UserError(f"{name} holds numbers that are not finite; the file is damaged")
    return value


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a file's tensors. Raises UserError for any other file."""
    shapes, _ = _open(path)
    return shapes


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors header. Raises UserError for any other file."""
    with _naming(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file, one tensor in memory at a time. `dtype` None keeps each tensor's.

    Format: 8 bytes of header length, the header in JSON, the tensors' bytes
    (https://github.com/huggingface/safetensors). Safetensors' own writer orders the metadata at
    random, so that equal files differ; before 0.8 it also copies all tensors first. Raises RunError
    for a number that is not finite.
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


def tensor_bytes(key: str, tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """Return a tensor's numbers in `dtype`, as a file holds them.

    Raises RunError, naming the tensor, for a number that is not finite.
    """
    value = tensor.detach().to("cpu", dtype).contiguous()
    if not _is_finite(value):
        raise RunError(f"{key} holds numbers that are not finite in {dtype}; not written")
    return value.flatten().view(torch.uint8).numpy().data


def _open(path: Path) -> tuple[dict[str, list[int]], Callable[[str], object]]:
    """Return the tensors' names and shapes, and a function that reads one."""
    with _naming(path):
        if path.suffix == ".safetensors":
            return _open_safetensors(path)
        return _open_pickle(path)


def _open_safetensors(path: Path) -> tuple[dict[str, list[int]], Callable[[str], object]]:
    file = safe_open(path, framework="pt")
    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}

    def read(key: str) -> Tensor:
        # Open the file for each: what was read of a mapped file stays in memory until it is closed.
        return safe_open(path, framework="pt").get_tensor(key)

    return shapes, read


def _open_pickle(path: Path) -> tuple[dict[str, list[int]], Callable[[str], object]]:
    mapped = zipfile.is_zipfile(path)  # tensors stay in the file until they are used
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    values = {str(key): value for key, value in loaded.items()}
    shapes = {key: list(getattr(value, "shape", ())) for key, value in values.items()}
    return shapes, values.__getitem__


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite: any other shows in the minimum or the maximum."""
    if tensor.numel() == 0:
        return True
    least, largest = tensor.aminmax()  # unlike torch.isfinite(tensor), it makes no second tensor
    return math.isfinite(least) and math.isfinite(largest)


@contextmanager
def _naming(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Turn what a reader raises on a damaged file into a UserError that names the file."""
    _check_path(path)
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{path}: not a file of plain tensors; not read, since such a pickle can run code"
        ) from error
    except Exception as error:  # each reader has exceptions of its own
        name = f"{path}: {tensor}" if tensor else f"{path}"
        reason = first_line(error)[:120] or type(error).__name__
        if not reason.isprintable():  # it may quote the file
            reason = ascii(reason)
        raise UserError(f"{name}: damaged, or not a file of tensors ({reason})") from error


def _check_path(path: Path) -> None:
    """Raise UserError for a path that cannot be opened, or that the readers cannot take."""
    open_file(path).close()
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: cannot be read (the path is not UTF-8)") from error
