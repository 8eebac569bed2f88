"""Read Hugging Face GPT-2 directories in all their forms; write transformers' own.

Files on the hub name tensors `h.0.ln_1.weight` and carry the causal masks; transformers itself
writes `transformer.h.0.ln_1.weight`, with or without a copy of the tied head. In all of them
the four projections are Conv1D weights, (in, out); `nn.Linear` here holds (out, in).
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_path, brief, check_number, file_sha256, read_json, write_json
from common.tensors import read_shapes, read_tensors, write_tensors
from model.gpt2 import GPT2, GPT2Config

CONFIG, WEIGHTS, PICKLED_WEIGHTS = "config.json", "model.safetensors", "pytorch_model.bin"
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # causal masks: derived, not trained
HEAD = "lm_head.weight"
# Fields that change what the same tensors compute, and the values that are supported here.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "scale_attn_weights": (True, False),
    "scale_attn_by_inverse_layer_idx": (False, True),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
ALIASES = {  # transformers takes either name
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
LIMITS = {"n_layer": (int, 1, 512)} | dict.fromkeys(
    ("vocab_size", "n_positions", "n_embd", "n_head", "n_inner"), (int, 1, 1 << 20)
)


def load_gpt2(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    quantise: Callable[[nn.Linear], nn.Linear] | None = None,
) -> GPT2:
    """Load the model of a Hugging Face GPT-2 directory on the CPU, in evaluation mode.

    Linear layers and embeddings are read in `dtype` and norms in fp32, as `Device.place` keeps a
    frozen model; the whole is never held in fp32 first. With `quantise`, each linear layer is read
    in fp32, and what `quantise` makes of it takes its place before the next is read.

    Raises UserError for a tensor that is missing, unexpected, not finite, or of another shape or
    type, and for a config field that asks for another architecture.
    """
    directory = Path(directory)
    with torch.device("meta"):
        model = GPT2(load_config(directory))
    rounded = nn.Embedding if quantise else nn.Linear | nn.Embedding
    for module in model.modules():
        if isinstance(module, rounded):
            module.to(dtype)  # on meta: a type and no data

    model.eval()
    for name, value in read_parameters(weights_path(directory), dict(model.named_parameters())):
        place, _, part = name.rpartition(".")
        module = model.get_submodule(place)
        setattr(module, part, nn.Parameter(value))
        if quantise and isinstance(module, nn.Linear) and part == "bias":  # its last parameter
            model.set_submodule(place, quantise(module))
    return model


def read_parameters(path: Path, needed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters one by one, with the shapes, (out, in), and dtypes of `needed`;
    skip the file's causal masks. Raises UserError as `load_gpt2` does.
    """
    keys = read_shapes(path)
    prefix = "transformer." if any(key.startswith("transformer.") for key in keys) else ""
    shapes = {HEAD: needed["wte.weight"].shape} | {
        prefix + name: p.shape[::-1] if CONV1D.search(name) else p.shape
        for name, p in needed.items()
    }
    tied = {HEAD} if f"{prefix}wte.weight" in keys else {f"{prefix}wte.weight"}
    masks = {key for key in keys if MASK.match(key.removeprefix(prefix))}
    head = None  # the tied head, if the file has it: `shapes`, and so the loop, begins with it
    for key, tensor in read_tensors(path, shapes, optional=tied, unread=masks):
        name = "wte.weight" if key == HEAD else key.removeprefix(prefix)
        # A copy: the file may be replaced. For a meta tensor, `empty_like` would import sympy.
        value = torch.empty(needed[name].shape, dtype=needed[name].dtype)
        value.copy_(tensor.t() if CONV1D.search(key) else tensor)
        if name != "wte.weight" or head is None:
            yield name, value
        elif not torch.equal(head, value):
            raise UserError(f"{path}: {HEAD} differs from wte.weight; GPT-2's head is tied to it")
        head = value if key == HEAD else None


def find_weights(directory: Path) -> Path | None:
    """Return the base's weights file, if any. Raises UserError if they are split into shards."""
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if os.path.lexists(path := Path(directory) / name):  # a dangling link is no absence
            return path
        if os.path.exists(index := f"{path}.index.json"):
            raise UserError(
                f"{index}: sharded weights are not read; save one file with "
                "transformers' save_pretrained(..., max_shard_size='100GB')"
            )
    return None


def weights_path(directory: Path) -> Path:
    """Return the base's weights file. Raises UserError if it is missing, or split into shards."""
    if path := find_weights(directory):
        return path
    raise UserError(f"{directory}: holds neither {WEIGHTS} nor {PICKLED_WEIGHTS}")


def base_hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of the two files that decide what a base computes: its identity."""
    weights = find_weights(directory)
    return {"config": file_sha256(directory / CONFIG)} | (
        {"weights": file_sha256(weights)} if weights else {}
    )


def load_config(directory: Path) -> GPT2Config:
    """Read `config.json`. Raises UserError, naming the field, for anything but a GPT-2."""
    path = Path(directory) / CONFIG
    if os.path.exists(path.with_name("adapter_config.json")) and not os.path.exists(path):
        raise UserError(f"{directory}: is an adapter, not a base; --adapter takes it")
    stored = {ALIASES.get(name, name): value for name, value in read_json(path).items()}
    if "model_type" not in stored and not {"n_embd", "n_layer", "n_head"} <= stored.keys():
        raise UserError(
            f"{path}: has neither a model_type nor GPT-2's own fields; only GPT-2 is known"
        )
    for field, known in SUPPORTED.items():
        if field in stored and stored[field] not in known:
            raise UserError(
                f"{path}: {field} {brief(stored[field])} is not supported, only "
                f"{' or '.join(map(repr, known))}"
            )
    fields = {f.name: stored[f.name] for f in dataclasses.fields(GPT2Config) if f.name in stored}
    for field, value in fields.items():
        if field not in SUPPORTED and (field, value) != ("n_inner", None):
            check_number(path, field, value, *LIMITS.get(field, (int | float, 0, 1)))
    config = GPT2Config(
        **fields,
        token_ids={name: value for name, value in stored.items() if name.endswith("_token_id")},
    )
    if config.n_embd % config.n_head:
        raise UserError(f"{path}: n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    return config


def save_gpt2(
    model: GPT2, directory: Path, dtype: torch.dtype | None = None, end_of_text: int | None = None
) -> None:
    """Write `config.json` and `model.safetensors` in transformers' own layout, each atomically.

    The tied head is written once, as `transformer.wte.weight`. A `dtype` of None keeps each's own.
    Raises RunError, and leaves what was there, if a number is not finite in `dtype`.
    """
    directory = Path(directory)
    tensors: dict[str, Tensor] = {
        f"transformer.{name}": p.detach().t() if CONV1D.search(name) else p.detach()
        for name, p in model.named_parameters()
    }
    fields = dataclasses.asdict(model.config)
    token_ids = fields.pop("token_ids")
    eos = token_ids.get("eos_token_id") if end_of_text is None else end_of_text
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **fields,
        "n_ctx": model.config.n_positions,
        **{"bos_token_id": end_of_text, **token_ids, "eos_token_id": eos},
        "torch_dtype": str(dtype or model.wte.weight.dtype).removeprefix("torch."),
    }
    with atomic_path(directory / WEIGHTS) as temporary:
        write_tensors(temporary, tensors, {"format": "pt"}, dtype)
        write_json(directory / CONFIG, config)
