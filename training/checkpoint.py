"""checkpoint.safetensors and the one before it: written whole, verified before they are believed.

The tensors of a nested state go into the file as tensors; the rest, with the tensors' names in
their places, is JSON in the header. The header also holds the sha256 of the whole file, computed
with zeros in the digest's own place.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from common.files import atomic_path
from common.tensors import read_metadata, write_tensors

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
NO_DIGEST = b"0" * 64


def write_checkpoint(out: Path, state: dict) -> None:
    """Save `state` as the newest checkpoint; the newest before it becomes the previous one.

    At every instant one of the two is whole. `state` is a dict of numbers, strings, lists, tensors
    and such dicts.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_tensors(state, "", tensors))
    with atomic_path(out / CHECKPOINT, backup=out / PREVIOUS) as temporary:
        write_tensors(temporary, tensors, {"sha256": NO_DIGEST.decode(), "state": tree})
        digest, place = _sha256(temporary)
        with open(temporary, "r+b") as file:
            file.seek(place)
            file.write(digest.encode())


def has_checkpoint(out: Path) -> bool:
    return any(os.path.lexists(out / name) for name in (CHECKPOINT, PREVIOUS))


def read_checkpoint(out: Path) -> dict:
    """Return the newest whole state; if a newer one is damaged, warn and replace it.

    Raises UserError if no file is whole.
    """
    damaged = []
    for path in filter(os.path.lexists, (out / CHECKPOINT, out / PREVIOUS)):
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


def _read(path: Path) -> dict:
    metadata = read_metadata(path)
    if metadata.get("sha256") != _sha256(path)[0]:
        raise UserError(f"{path}: damaged (its sha256 is not that of its content)")
    tensors = load_file(path)

    def put_tensors(node: dict) -> object:
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {int(key) if key.isdigit() else key: value for key, value in node.items()}

    return json.loads(metadata["state"], object_hook=put_tensors)


def _sha256(path: Path) -> tuple[str, int]:
    """Return the file's sha256, with zeros for the digest in its header, and that one's offset."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        start = file.read(1 << 10)  # `write_tensors` puts the metadata first
        place = start.find(b'"sha256": "') + len(b'"sha256": "')
        digest.update(start[:place] + NO_DIGEST + start[place + len(NO_DIGEST):])
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest(), place


def _take_tensors(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Move a state's tensors into `tensors`, and leave their names in their places."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _take_tensors(item, f"{name}.{key}".lstrip("."), tensors)
                for key, item in value.items()}
    return value
