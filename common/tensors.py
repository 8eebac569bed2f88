"""Read files of tensors, strictly, and write them: models, adapters and checkpoints."""

import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import RunError, UserError
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
    keys, get = _open(path)
    if missing := sorted(shapes.keys() - keys - set(optional)):
        raise UserError(
            f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); "
            "the file is of another model"
        )
    if extra := sorted(keys.keys() - shapes.keys() - set(unread)):
        raise UserError(
            f"{path}: unexpected tensor {extra[0]!r:.120}; the file is of another model"
        )
    for key in filter(keys.__contains__, shapes):
        with _naming(path, f"{key}: "):
            tensor = get(key)
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        if kind not in DTYPES:
            raise UserError(f"{path}: {key} is not a tensor of fp32, fp16 or bf16 ({kind})")
        if tensor.layout != torch.strided or tensor.is_meta:  # torch.load can return these
            raise UserError(f"{path}: {key} is sparse or holds no data; save it as a dense tensor")
        if tensor.shape != torch.Size(shapes[key]):
            raise UserError(
                f"{path}: {key} is {brief(tuple(tensor.shape))} where "
                f"{tuple(shapes[key])} is needed"
            )
        if not _is_finite(tensor):
            raise UserError(f"{path}: {key} holds numbers that are not finite; the file is damaged")
        yield key, tensor


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a file's tensors. Raises UserError for any other file."""
    return _open(path)[0]


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
        begin, end = end, end + tensor.numel() * stored.itemsize
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
            value = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            if not _is_finite(value):
                raise RunError(
                    f"{key} holds numbers that are not finite in {value.dtype}; not written"
                )
            file.write(value.flatten().view(torch.uint8).numpy())


def _open(path: Path) -> tuple[dict[str, list[int]], Callable[[str], object]]:
    """Return the tensors' names and shapes, and a function that reads one."""
    with _naming(path):
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            # Open it for each: what was read of a mapped file stays in memory until it is closed.
            return shapes, lambda key: safe_open(path, framework="pt").get_tensor(key)
        stored = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )  # tensors stay in the file until used
        stored = {str(key): value for key, value in stored.items()}
        return {key: [*getattr(x, "shape", ())] for key, x in stored.items()}, stored.get


def _is_finite(tensor: Tensor) -> bool:
    # If any number is not finite, nor is the least or the largest. This copies no tensor.
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


@contextmanager
def _naming(path: Path, tensor: str = "") -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into a UserError that names the file."""
    open_file(path).close()
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{path}: not a file of plain tensors; not read, since such a pickle can run code"
        ) from error
    except Exception as error:  # each reader has exceptions of its own
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        reason = reason if reason.isprintable() else ascii(reason)  # it may quote the file
        raise UserError(f"{path}: {tensor}damaged, or not a file of tensors ({reason})") from error
