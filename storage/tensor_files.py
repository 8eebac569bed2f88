"""Read a model's tensors from a file of safetensors or torch.save, with strict checks."""

import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import as_failure, describe_failure
from lora.tensors import check_names, checked, damaged, readable


def read_tensors(
    path: Path,
    shapes: Mapping[str, Collection[int]],
    unread: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors named in `shapes` one by one, each in the precision of the file.

    Raises UserError, naming the tensor, for a tensor that is missing, unexpected (unless in
    `unread`), of another shape, not fp32, fp16 or bf16, or not finite. Names are checked before the
    first tensor is read.
    """
    with as_failure(), readable(path):
        stored, read = _open(path)
        check_names(path, stored.keys() - set(unread), shapes)
        for key, shape in shapes.items():
            yield key, checked(read(key), torch.Size(shape), f"{path}: {key}")


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a file's tensors. Raises UserError for another kind of file."""
    with as_failure(), readable(path):
        shapes, _ = _open(path)
        return shapes


def _open(path: Path) -> tuple[dict[str, list[int]], Callable[[str], Tensor]]:
    """Return the names and shapes of the tensors, and a function that reads a tensor by name."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        # Reopen the file for each tensor, because memory-mapped pages stay in memory until the file
        # is closed.
        return shapes, lambda key: safe_open(path, framework="pt").get_tensor(key)

    tensors = _load_pickle(path)
    return {key: list(value.shape) for key, value in tensors.items()}, tensors.__getitem__


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # tensors are read when they are used
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: not a file of tensors; not read, because such a pickle can run code"
        ) from error
    except Exception as error:  # torch.load raises various exceptions for a damaged file
        if isinstance(error, OSError) or describe_failure(error):  # such as too little memory
            raise
        raise damaged(path, error) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: not a file of tensors, but of a {type(tensors).__name__}")
    for key, value in tensors.items():
        is_dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not is_dense or value.is_meta:
            raise ValueError(
                f"{path}: not a file of tensors by name: {key!r:.80} is something else"
            )
    return tensors
