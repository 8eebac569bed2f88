"""Read GPT-2 directories in all layouts of Hugging Face. Write the layout of transformers.

In files on the hub, a tensor is called `h.0.ln_1.weight`, and the causal masks are included.
transformers calls it `transformer.h.0.ln_1.weight`, and writes a copy of the tied head or none. All
layouts store the weights of the four linear layers of a block in the shape (in, out), as Conv1D
does. In this project, these weights have the shape (out, in), as in `nn.Linear`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import RunError, UserError, as_failure
from common.files import atomic_path, brief, file_sha256, read_json, write_json
from data.tokenizer import FAST, MERGES, VOCAB
from lora.tensors import write_tensors
from model.gpt2 import GPT2, GPT2Config
from storage.tensor_files import read_shapes, read_tensors

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # causal masks: derived, not trained
HEAD = "lm_head.weight"
# Supported values of the config fields that change the computation but not the tensors.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
WHOLE_NUMBERS = ("n_layer", "vocab_size", "n_positions", "n_embd", "n_head", "n_inner")
MOST_LAYERS = 512  # so that a damaged config cannot ask for a million layers


def load_gpt2(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    quantise: Callable[[nn.Linear], nn.Linear] | None = None,
) -> GPT2:
    """Load the model of a Hugging Face GPT-2 directory on the CPU, in evaluation mode.

    Linear layers and embeddings are read in `dtype`. Norms are read in fp32. In a 16-bit `dtype`,
    the whole model is never in memory in fp32. With `quantise`, each linear layer is read in fp32
    and replaced by `quantise(layer)` before the next layer is read.

    Raises UserError for a tensor that is missing, unexpected, not finite, or of another shape or
    type, and for a config field that asks for another architecture.
    """
    directory = Path(directory)
    with torch.device("meta"):
        model = GPT2(load_config(directory))
    rounded = nn.Embedding if quantise else nn.Linear | nn.Embedding
    for module in model.modules():
        if isinstance(module, rounded):
            module.to(dtype)  # on the meta device, so this sets only the dtype

    model.eval()
    for name, value in read_parameters(weights_path(directory), dict(model.named_parameters())):
        place, _, part = name.rpartition(".")
        module = model.get_submodule(place)
        setattr(module, part, nn.Parameter(value))
        if quantise and isinstance(module, nn.Linear) and part == "bias":  # read after weight
            model.set_submodule(place, quantise(module).to(dtype))  # W is in codes: casts the bias
    return model


def read_parameters(path: Path, needed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters one by one, in the shapes and dtypes of `needed`."""
    keys = read_shapes(path)
    prefix = "transformer." if any(key.startswith("transformer.") for key in keys) else ""
    masks = {key for key in keys if MASK.match(key.removeprefix(prefix))}
    shapes = {HEAD: needed["wte.weight"].shape} if HEAD in keys else {}
    for name, parameter in needed.items():
        shape = parameter.shape
        if CONV1D.search(name):
            shape = shape[::-1]
        shapes[prefix + name] = shape

    head = None
    for key, tensor in read_tensors(path, shapes, unread=masks):
        if key == HEAD:  # the head comes first, because `shapes` lists it first
            head = tensor
            continue
        name = key.removeprefix(prefix)
        # Copy, because a memory-mapped file may be replaced. `torch.empty` is used, because
        # `empty_like` of a meta tensor would import sympy, which is slow.
        value = torch.empty(needed[name].shape, dtype=needed[name].dtype)
        if name == "wte.weight" and head is not None:
            if not torch.equal(head, tensor):
                raise UserError(f"{path}: {HEAD} differs from wte.weight, but GPT-2's head is tied")
            head = None  # frees a large tensor
        if CONV1D.search(key):
            tensor = tensor.t()
        yield name, value.copy_(tensor)


def find_weights(directory: Path) -> Path | None:
    """Return the base's weights file, if any. Raises UserError for weights in shards."""
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        path = Path(directory) / name
        if path.exists():
            return path
        index = Path(f"{path}.index.json")
        if index.exists():
            raise UserError(
                f"{index}: sharded weights are not supported; save one file with "
                "transformers' save_pretrained(..., max_shard_size='100GB')"
            )
    return None


def weights_path(directory: Path) -> Path:
    """Return the base's weights file. Raises UserError for missing weights or weights in shards."""
    path = find_weights(directory)
    if path is None:
        raise UserError(f"{directory}: has neither {WEIGHTS} nor {PICKLED_WEIGHTS}")
    return path


def base_hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of the files that identify a base: the config, and the weights and the
    tokenizer's files, if any.
    """
    _refuse_adapter(directory)
    hashes = {"config": file_sha256(directory / CONFIG)}
    weights = find_weights(directory)
    if weights:
        hashes["weights"] = file_sha256(weights)
    for name in (FAST, VOCAB, MERGES):
        if (directory / name).exists():
            hashes[name] = file_sha256(directory / name)
    return hashes


def load_config(directory: Path) -> GPT2Config:
    """Read `config.json`. Raises UserError, naming the field, for a model that is not a GPT-2."""
    path = Path(directory) / CONFIG
    _refuse_adapter(path.parent)
    stored = read_json(path)
    _check_architecture(path, stored)
    fields = {f.name: stored[f.name] for f in dataclasses.fields(GPT2Config) if f.name in stored}
    for field, value in fields.items():
        _check_field(path, field, value)

    token_ids = {name: value for name, value in stored.items() if name.endswith("_token_id")}
    config = GPT2Config(**fields, token_ids=token_ids)
    if config.n_embd % config.n_head:
        raise UserError(
            f"{path}: n_embd {config.n_embd} is not divisible by n_head {config.n_head}"
        )
    return config


def _refuse_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").exists() and not (directory / CONFIG).exists():
        raise UserError(f"{directory}: is an adapter, not a base; give it to --adapter")


def _check_architecture(path: Path, stored: dict) -> None:
    """Raise UserError if the config is not a GPT-2, or is an unsupported variant of GPT-2."""
    for field, known in SUPPORTED.items():
        if field in stored and stored[field] not in known:
            raise UserError(
                f"{path}: {field} {brief(stored[field])} is not supported, only "
                f"{' or '.join(map(repr, known))}"
            )


def _check_field(path: Path, field: str, value: Any) -> None:
    """Raise UserError for a number that is out of range."""
    if field in SUPPORTED or (field == "n_inner" and value is None):
        return
    if field in WHOLE_NUMBERS:
        largest = MOST_LAYERS if field == "n_layer" else 1 << 20
        fits = type(value) is int and 1 <= value <= largest
    else:  # dropouts and the LayerNorm's epsilon
        fits = type(value) in (int, float) and 0 <= value <= 1
    if not fits:
        raise UserError(f"{path}: {field} {brief(value)} is out of range")


def save_gpt2(
    model: GPT2, directory: Path, dtype: torch.dtype | None = None, end_of_text: int | None = None
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` in the layout
    of transformers, each atomically.

    The tied head is written once, as `transformer.wte.weight`. A `dtype` of None keeps the dtype of
    each tensor. Raises RunError, and keeps the old files, for a number that is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if CONV1D.search(name):
            value = value.t()
        tensors[f"transformer.{name}"] = value

    config = _stored_config(model.config, dtype or model.wte.weight.dtype, end_of_text)
    with as_failure(RunError), atomic_path(Path(directory) / WEIGHTS) as temporary:
        write_tensors(temporary, tensors, {"format": "pt"}, dtype)
        write_json(Path(directory) / CONFIG, config)
        write_json(Path(directory) / GENERATION, _generation_config(config))


def _stored_config(config: GPT2Config, dtype: torch.dtype, end_of_text: int | None) -> dict:
    """Return the content of `config.json`. If `end_of_text` is given, it becomes eos_token_id."""
    fields = dataclasses.asdict(config)
    token_ids = {"bos_token_id": end_of_text} | fields.pop("token_ids")
    if end_of_text is not None:
        token_ids["eos_token_id"] = end_of_text
    token_ids.setdefault("eos_token_id", None)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **fields,
        "n_ctx": config.n_positions,
        **token_ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _generation_config(config: dict) -> dict:
    """Return the content of `generation_config.json`: the ids that begin, end and pad a text."""
    ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["eos_token_id"]
    return {name: token for name, token in ids.items() if token is not None}
