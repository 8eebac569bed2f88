"""Find out whether a merge kept the update: `python -m lora_conformance merged BASE ADAPTER MERGED`.

BASE and MERGED are folders of safetensors in transformers' layout, and ADAPTER is a folder in
PEFT's format. For each adapted parameter, the command prints |merged - (W + s B A)| / |s B A|. This
is about 0 if the update survived, and 1 if the update was lost or applied twice. The exit status is
0 if all updates survived, 1 if not, and 2 if the folders cannot be compared.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.linalg import norm

from lora_conformance.tensors import Array, Stored, find

Merge = Callable[[Array], Array]
ROUNDING = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # relative
PART = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_(embedding_)?(A|B|magnitude_vector)\b.*")
HEAD = "lm_head.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
# The matrices of each expert that a 3-D parameter stacks, by the parameter's name.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Fields that change the merged weights, and their supported values besides "unset".
SUPPORTED: dict[str, tuple] = {
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # the others change W
    "bias": ("none",),
    "lora_bias": (),
    "modules_to_save": (),
}


class Mistake(ValueError):
    """The folders cannot be compared. The message is one line."""


Tensors = Mapping[str, Stored]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise Mistake(f"{path} is not valid JSON") from error
    if not isinstance(content, dict):
        raise Mistake(f"{path} is not a JSON object")
    return content


def open_tensors(folder: Path, name: str = "model.safetensors") -> dict[str, Stored]:
    """Find the tensors of a folder, which may be split into shards."""
    index = folder / f"{name}.index.json"
    files = set(read_json(index).get("weight_map", {}).values()) if index.exists() else {name}
    found: dict[str, Stored] = {}
    for file in sorted(files):
        found |= find(folder / file)
    return found


def places(tensors: Tensors, name: str) -> list[list[Stored]]:
    """Return where a parameter is stored, otherwise []. A file may lack the first part of the name,
    as `h.0.ln_1.weight` does on the hub. It may also store experts' matrices one by one: then there
    is a list of the experts' tensors for each matrix."""
    for key in (name, *(key for key in tensors if name.endswith(f".{key}"))):
        if key in tensors:
            return [[tensors[key]]]
    experts, _, parameter = name.rpartition(".")
    found = []
    for matrix in STACKED.get(parameter, ()):
        keys = (f"{experts}.{e}.{matrix}.weight" for e in range(len(tensors)))
        found.append([tensors[key] for key in keys if key in tensors])
    return found if all(found) else []


def join(found: list[list[Stored]]) -> Array:
    if len(found) == len(found[0]) == 1:
        return found[0][0].values()
    return np.concatenate([np.stack([one.values() for one in matrix]) for matrix in found], axis=1)


def updates(base: Tensors, adapter: Path) -> Iterator[tuple[str, Array, Merge]]:
    """Yield the name of each adapted parameter, its W, and the function that merges the update."""
    config = read_json(adapter / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise Mistake(f"{adapter}: peft_type {config.get('peft_type')!r} is not supported")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float):
            raise Mistake(f"{adapter}: adapter_config.json has no {field}")
    for field, values in SUPPORTED.items():
        if config.get(field) and config[field] not in values:
            raise Mistake(f"{adapter}: {field} {config[field]!r} is not supported")
    layers: dict[str, dict[str, Array]] = defaultdict(dict)
    for key, stored in open_tensors(adapter, "adapter_model.safetensors").items():
        match = PART.fullmatch(key)
        if match:
            layer, embedding, part = match.groups()
            layers[layer][part] = stored.values()
            layers[layer]["turned"] = np.array(bool(embedding))
        elif not key.endswith(".base_layer.weight"):  # a copy of an embedding or a head
            raise Mistake(f"{adapter}: {key} is not a part of LoRA")

    for layer, parts in sorted(layers.items()):
        if not {"A", "B"} <= parts.keys():
            raise Mistake(f"{adapter}: {layer} lacks A or B")
        fits = []
        for name in parameters(layer, config):
            tied = name == HEAD and not places(base, name)  # the base's head is its embedding
            found_by_name = [places(base, key) for key in (EMBEDDINGS if tied else (name,))]
            for found in filter(None, found_by_name):
                weight = join(found)
                merge = merger(name.removesuffix(".weight"), weight, parts, config)
                fits += [(name, weight, merge)] if merge else []
        if len(fits) != 1:
            raise Mistake(f"{adapter}: {layer} fits {len(fits) or 'no'} parameters of the base")
        yield fits[0]


def parameters(layer: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the parameters that the tensors of a layer may adapt."""
    module = layer.replace(".base_layer", "")  # PEFT nests the adapters of a module's parameters
    yield f"{module}.weight"
    for target in config.get("target_parameters") or ():
        name = f"{module}.{target.rpartition('.')[2]}"
        if f".{name}".endswith(f".{target}"):
            yield name


def merger(
    name: str, weight: Array, parts: Mapping[str, Array], config: Mapping[str, Any]
) -> Merge | None:
    """Return the function that merges the update into a weight, or None if the shapes differ."""
    r = matched(config.get("rank_pattern"), name, config["r"])
    alpha = matched(config.get("alpha_pattern"), name, config["lora_alpha"])
    s = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    experts = len(weight) if weight.ndim == 3 else 1
    a, b = parts["A"], parts["B"]
    if len(a) != experts * r or b.shape[1] != experts * r:
        return None
    # The rows of A are grouped by expert. In B, the columns of an expert are `experts` apart.
    delta = s * b.reshape(-1, r, experts).transpose(2, 0, 1) @ a.reshape(experts, r, -1)
    delta = delta if weight.ndim == 3 else delta[0]
    turned = bool(parts["turned"]) or bool(config.get("fan_in_fan_out"))
    if delta.shape != delta.swapaxes(-1, -2).shape:
        turned = weight.shape != delta.shape
    delta = delta.swapaxes(-1, -2) if turned else delta
    if delta.shape != weight.shape:
        return None
    magnitude = parts.get("magnitude_vector")

    def merge(weight: Array) -> Array:
        v = weight + delta
        if magnitude is None:
            return v
        axis = 0 if turned else 1  # of the inputs
        return v * np.expand_dims(magnitude.reshape(-1) / norm(v, axis=axis), axis)

    return merge


def matched(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a layer's name, or the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def judge(base: Array, merge: Merge, merged: Array, rounding: float) -> tuple[float, str]:
    """Return the difference relative to the update's norm, and a verdict on one parameter."""
    once = merge(base)
    update = once - base
    change = merged - base
    size = float(norm(update))
    if size == 0:
        return 0.0, "no update"

    def relative(difference: Array) -> float:
        return float(norm(difference)) / size

    # Rounding can cost a small update more than half of its size. Such an update is lost.
    noise = 0.01 + rounding * relative(once)
    tolerance = min(0.5, noise)
    factor = float(np.vdot(update, change)) / size**2
    difference = relative(merged - once)
    if difference <= tolerance:
        return difference, "survived"
    if relative(merged - merge(once)) <= tolerance:
        return difference, "applied twice, or scaled by 2"
    if abs(factor) > 2 * tolerance and relative(change - factor * update) <= tolerance:
        return difference, f"scaled by {factor:.3g}"
    lost = factor < 0.5 and abs(difference - 1) <= 0.1 + noise
    return difference, "lost" if lost else "changed"


def compare(base: Path, adapter: Path, merged: Path) -> bool:
    """Print a line for each parameter, and the verdict. Return whether all updates survived."""
    for folder in (base, adapter, merged):
        if not folder.is_dir():
            raise Mistake(f"{folder} is not a folder")
    tensors = open_tensors(merged)
    verdicts: dict[str, int] = defaultdict(int)
    for name, weight, merge in updates(open_tensors(base), adapter):
        found = places(tensors, name)
        if not found:
            tied = "; a head with an update cannot be tied" if name == HEAD else ""
            raise Mistake(f"{merged}: has no {name}{tied}")
        result = join(found)
        if result.shape != weight.shape:
            raise Mistake(f"{merged}: {name} has shape {result.shape}, not {weight.shape}")
        difference, verdict = judge(weight, merge, result, ROUNDING[found[0][0].dtype])
        verdicts[verdict] += 1
        print(f"{difference:8.4f}  {verdict:14}  {name}")
    verdicts.pop("no update", None)
    if not verdicts:
        raise Mistake(f"{adapter}: s B A is zero everywhere, so a merge changes nothing")
    for verdict, number in verdicts.items():
        print(f"{verdict}: {number} of {sum(verdicts.values())} layers")
    return verdicts.keys() == {"survived"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lora_conformance merged",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("base", "adapter", "merged"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    args = parser.parse_args(argv)
    try:
        return 0 if compare(args.base, args.adapter, args.merged) else 1
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: cannot be read ({error.strerror})"
    print(f"lora_conformance merged: {message}", file=sys.stderr)
    return 2
