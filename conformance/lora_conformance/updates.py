"""The updates of an adapter in PEFT's format: for each parameter, W and the function that merges.

A base and a merged model are folders of safetensors in transformers' layout.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.linalg import norm

from lora_conformance.tensors import Array, Stored, find

Merge = Callable[[Array], Array]
Config = Mapping[str, Any]
PART = re.compile(r"(.+?)\.lora_(embedding_)?(A|B|magnitude_vector)\b.*")
TOKENS = ".token_adapter.trainable_tokens_delta"
HEAD = "lm_head.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
# The matrices of each expert that a 3-D parameter stacks. Mixtral's files have the names w1 to w3.
STACKED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# The kinds of model in which PEFT takes experts for (experts, in, out). Otherwise: (E, out, in).
IN_OUT = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
# Fields that change the merged weights, and their supported values besides "unset".
SUPPORTED: dict[str, tuple] = {
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # the others change W
    "bias": ("none",),
    "lora_bias": (),
    "ensure_weight_tying": (),
}


class Mistake(ValueError):
    """The folders cannot be compared. The message is one line."""


class Update(NamedTuple):
    """A parameter's name, its W, and its merge: W + s B A, or W itself where no update belongs."""

    name: str
    weight: Array
    merge: Merge


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


class Model:
    """A folder with a base or a merged model. `taken` has the tensors that `find` returned."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors = open_tensors(folder)
        path = folder / "config.json"
        config = read_json(path) if path.exists() else {}
        self.config = config | config.get("text_config", {})
        kinds = config.get("architectures") or ["LM"]
        headless = not any("LM" in kind or "Generation" in kind for kind in kinds)
        tied = self.config.get("tie_word_embeddings", False) or not self.stored(HEAD)
        self.tied = tied and not headless
        self.taken: set[Stored] = set()

    def find(self, name: str) -> list[list[Stored]]:
        """Return where a parameter is stored, otherwise []. A tied head is the embedding."""
        names = EMBEDDINGS if name == HEAD and self.tied else (name,)
        found = next(filter(None, map(self.stored, names)), [])
        self.taken |= {one for matrix in found for one in matrix}
        return found

    def stored(self, name: str) -> list[list[Stored]]:
        """A file may lack the first part of a name, as `h.0.ln_1.weight` does on the hub. It may
        also store experts' matrices one by one: then there is a list of tensors for each matrix.
        """
        for key in (name, *(key for key in self.tensors if name.endswith(f".{key}"))):
            if key in self.tensors:
                return [[self.tensors[key]]]
        experts, _, parameter = name.rpartition(".")
        for folder in (experts, experts.replace(".mlp.experts", ".block_sparse_moe.experts")):
            for matrices in STACKED.get(parameter, ()):
                found = [self.numbered(f"{folder}.{{}}.{matrix}.weight") for matrix in matrices]
                if all(found):
                    return found
        return []

    def numbered(self, name: str) -> list[Stored]:
        keys = map(name.format, range(len(self.tensors)))
        return [self.tensors[key] for key in keys if key in self.tensors]


def join(found: list[list[Stored]]) -> Array:
    if len(found) == len(found[0]) == 1:
        return found[0][0].values()
    return np.concatenate([np.stack([one.values() for one in matrix]) for matrix in found], axis=1)


def updates(base: Model, adapter: Path) -> Iterator[Update]:
    """Yield the updates of an adapter, and its copies of modules and rows of tokens. If the base
    ties the head to the embedding, an update of one leaves the other as it is.
    """
    config = read_config(adapter)
    layers: dict[str, dict[str, Array]] = defaultdict(dict)
    found = []
    for key, stored in open_tensors(adapter, "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        match = PART.fullmatch(name)
        if match:
            layer, embedding, part = match.groups()
            layers[layer][part] = stored.values()
            layers[layer]["turned"] = np.array(bool(embedding))
        elif name.endswith(TOKENS):
            found.append(tokens(base, name.removesuffix(TOKENS), stored.values(), config))
        elif set(name.split(".")) & set(config.get("modules_to_save") or ()):
            found.append(copied(base, name, stored.values()))
        elif not name.endswith(".base_layer.weight"):  # a copy of an embedding or a head
            raise Mistake(f"{adapter}: {key} is not a part of LoRA")
    found += [lora(base, layer, parts, config) for layer, parts in layers.items()]
    yield from sorted(found, key=lambda update: update.name)
    yield from partners(base, {update.name: update for update in found}, config)


def read_config(adapter: Path) -> Config:
    config = read_json(adapter / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise Mistake(f"{adapter}: peft_type {config.get('peft_type')!r} is not supported")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float):
            raise Mistake(f"{adapter}: adapter_config.json has no {field}")
    for field, values in SUPPORTED.items():
        if config.get(field) and config[field] not in values:
            raise Mistake(f"{adapter}: {field} {config[field]!r} is not supported")
    return config


def copied(base: Model, name: str, values: Array) -> Update:
    """Return the copy of a tensor of `modules_to_save`. The base may lack a new head."""
    found = base.find(name)
    return Update(name, join(found) if found else np.zeros_like(values), lambda _: values)


def tokens(base: Model, module: str, rows: Array, config: Config) -> Update:
    """Return the new rows of an embedding (`trainable_token_indices`)."""
    indices = config.get("trainable_token_indices") or ()
    if isinstance(indices, Mapping):
        indices = next((v for k, v in indices.items() if f".{module}".endswith(f".{k}")), ())
    found = base.find(f"{module}.weight")
    if not found or len(indices) != len(rows):
        raise Mistake(f"{module}{TOKENS} does not fit the base")

    def merge(weight: Array) -> Array:
        merged = weight.copy()
        merged[list(indices)] = rows
        return merged

    return Update(f"{module}.weight", join(found), merge)


def partners(base: Model, found: Mapping[str, Update], config: Config) -> Iterator[Update]:
    """Yield the weight that is tied to an updated weight. PEFT trains tokens in both."""
    names = [key for key in EMBEDDINGS if base.tied and base.stored(key)]
    for name, other in [(HEAD, key) for key in names] + [(key, HEAD) for key in names]:
        if other in found and name not in found:
            merge = found[other].merge if config.get("trainable_token_indices") else np.copy
            yield Update(name, found[other].weight, merge)


def lora(base: Model, layer: str, parts: Mapping[str, Array], config: Config) -> Update:
    """Return the update of the one parameter that a layer's A and B fit."""
    if not {"A", "B"} <= parts.keys():
        raise Mistake(f"{layer} lacks A or B")
    fits = []
    for name in parameters(layer, config):
        stored = base.find(name)
        weight = join(stored) if stored else None
        merge = stored and merger(name.removesuffix(".weight"), weight, parts, config, base.config)
        fits += [Update(name, weight, merge)] if merge else []
    if len(fits) != 1:
        raise Mistake(f"{layer} fits {len(fits) or 'no'} parameters of the base")
    return fits[0]


def parameters(layer: str, config: Config) -> Iterator[str]:
    """Yield the names of the parameters that the tensors of a layer may adapt."""
    module = layer.replace(".base_layer", "")  # PEFT nests the adapters of a module's parameters
    yield f"{module}.weight"
    for target in config.get("target_parameters") or ():
        name = f"{module}.{target.rpartition('.')[2]}"
        if f".{name}".endswith(f".{target}"):
            yield name


def merger(
    name: str, weight: Array, parts: Mapping[str, Array], config: Config, of_base: Config
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
    elif weight.ndim == 3:
        if "model_type" not in of_base:
            raise Mistake(f"{name} is square, and the base has no config.json with a model_type")
        turned = of_base["model_type"] in IN_OUT
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
