"""Read files of tensors, strictly, and write them: models, adapters and checkpoints."""

import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import UserError, first_line
from common.files import brief, open_file
from lora.tensors import DTYPES, is_finite, write_tensors

__all__ = ["read_metadata", "read_shapes", "read_tensors", "write_tensors"]


def read_tensors(
    path: Path,
    shapes: Mapping[str, Collection[int]],
    unread: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors named in `shapes` one by one, each in the precision of the file.

    The file is `.safetensors`, or otherwise one that torch.save wrote. Raises UserError, naming the
    tensor, if one is missing, unexpected (unless in `unread`), of another shape, not of floating
    point or not finite. Names are checked before the first tensor is read.
    """
    with _errors_that_name(path):
        stored, read = _open(path)
        missing = sorted(shapes.keys() - stored.keys())
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
            yield key, _checked(read(key), torch.Size(shape), f"{path}: {key}")


def _checked(value: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return a tensor from a file. Raises UserError unless it is finite and of `shape`."""
    if value.dtype not in DTYPES:
        raise UserError(f"{name} is not a tensor of fp32, fp16 or bf16 ({value.dtype})")
    if value.shape != shape:
        raise UserError(f"{name} is {brief(tuple(value.shape))} where {tuple(shape)} is needed")
    if not is_finite(value):
        raise UserError(f"{name} holds numbers that are not finite; the file is damaged")
    return value


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a file's tensors. Raises UserError for any other file."""
    with _errors_that_name(path):
        shapes, _ = _open(path)
        return shapes


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors header. Raises UserError for any other file."""
    with _errors_that_name(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _open(path: Path) -> tuple[dict[str, list[int]], Callable[[str], Tensor]]:
    """Return the tensors' names and shapes, and a function that reads one."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        # Open the file for each tensor: its pages stay in memory until the file is closed.
        return shapes, lambda key: safe_open(path, framework="pt").get_tensor(key)

    mapped = zipfile.is_zipfile(path)  # tensors stay in the file until they are used
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return {key: list(value.shape) for key, value in tensors.items()}, tensors.__getitem__


@contextmanager
def _errors_that_name(path: Path) -> Iterator[None]:
    """Turn a reader's exception on a damaged file into a UserError that names the file."""
    open_file(path).close()
    try:
        yield
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f"{path}: not a file of plain tensors; not read, since such a pickle can run code"
        ) from error
    except Exception as error:  # each reader raises other classes
        reason = ascii(first_line(error)[:120])  # it may quote the file
        raise UserError(f"{path}: damaged, or not a file of tensors ({reason})") from error
