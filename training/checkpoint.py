"""Write checkpoints atomically, keep the previous checkpoint, and verify a hash when reading.

A checkpoint is a safetensors file with the state of a run, a nested dict. The file stores the
tensors of the state. The file's header contains the rest of the state as JSON, with a name in place
of each tensor. The header also contains the sha256 of the JSON and the tensors.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import RunError, UserError, as_failure
from common.files import atomic_path, brief, open_file
from lora.tensors import DTYPES, read_metadata, write_tensors

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
TENSOR = "tensor"  # the key that marks a tensor in the JSON


def write_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Save `state` as the newest checkpoint. Rename the old checkpoint to `PREVIOUS`.

    From the first save on, at least one of the two files is complete at every moment. Raises
    TypeError for a state that cannot be stored: see `_take_tensors`.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_tensors(state, "", tensors))
    metadata = {"sha256": content_sha256(tree, tensors), "state": tree}
    with as_failure(RunError), atomic_path(out / CHECKPOINT, backup=out / PREVIOUS) as temporary:
        write_tensors(temporary, tensors, metadata)


def has_checkpoint(out: Path) -> bool:
    return any(os.path.lexists(out / name) for name in (CHECKPOINT, PREVIOUS))


def read_checkpoint(out: Path) -> dict[str, Any]:
    """Return the state of the newest checkpoint. If this file is damaged, print a warning, and put
    the previous checkpoint in its place. Raises UserError if both files are damaged.
    """
    damaged = []
    for path in (out / CHECKPOINT, out / PREVIOUS):
        if not os.path.lexists(path):
            continue
        # If a checkpoint cannot be opened, raise an error. It may be intact, so the previous
        # checkpoint must not replace it.
        open_file(path).close()
        try:
            state = _read(path)
        except UserError as error:
            damaged.append(str(error))
            continue
        if damaged:
            print(f"warning: {damaged[0]}; resuming from {path}", file=sys.stderr)
            os.replace(path, out / CHECKPOINT)
        return state
    raise UserError(f"{'; '.join(damaged)}; start again with --overwrite")


def _read(path: Path) -> dict[str, Any]:
    """Return the state in a file. Raises UserError for a damaged file."""
    with as_failure():
        metadata = read_metadata(path)
    tensors = load_file(path)
    tree = metadata.get("state", "")
    if metadata.get("sha256") != content_sha256(tree, tensors):
        raise UserError(f"{path}: damaged (the sha256 does not match the content)")

    def put_tensors(node: dict[str, Any]) -> object:
        if TENSOR in node:
            return tensors[node[TENSOR]]
        # JSON turned the integer keys of AdamW's state into strings.
        return {int(key) if key.isdigit() else key: value for key, value in node.items()}

    return json.loads(tree, object_hook=put_tensors)


def content_sha256(tree: str, tensors: dict[str, Tensor]) -> str:
    """Return the hex sha256 of the JSON and of the name, type, shape and bytes of each tensor. The
    tensors are on the CPU.
    """
    digest = hashlib.sha256(tree.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take_tensors(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Copy a state's tensors to the CPU, into `tensors`. Return the state with names in place of
    tensors.

    A state is None, a number, a string, a tensor in fp32, fp16 or bf16, or a list or dict of
    states. A tuple comes back as a list. Raises TypeError, naming the place, for anything else, and
    for two tensors of one name, such as `a.b` and the `b` in `a`.
    """
    if isinstance(value, Tensor) and value.dtype in DTYPES and name not in tensors:
        tensors[name] = value.detach().cpu()
        return {TENSOR: name}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, dict) and all(_can_be_key(key) for key in value):
        inner = {}
        for key, item in value.items():
            inner[key] = _take_tensors(item, f"{name}.{key}" if name else str(key), tensors)
        return inner
    if value is None or isinstance(value, int | float | str):
        return value
    what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else brief(value)
    raise TypeError(f"a checkpoint cannot store {name}: {what}")


def _can_be_key(key: object) -> bool:
    """Return whether a dict comes back with this key. In AdamW's state, keys are whole numbers."""
    if type(key) is int:
        return key >= 0
    return isinstance(key, str) and key != TENSOR and not key.isdigit()
