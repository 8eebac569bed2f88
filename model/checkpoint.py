"""Hugging Face GPT-2 directories: read every shape they come in, write the one transformers loads.

Files on the hub name tensors `h.0.ln_1.weight` and carry the causal masks; transformers itself
writes `transformer.h.0.ln_1.weight`, with or without a copy of the tied head. In all of them
the four projections are Conv1D weights, (in, out); `nn.Linear` here holds (out, in).
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from errors import RunError, UserError
from files import atomic_path, read_json, write_json
from hardware import total_memory
from model.gpt2 import GPT2, GPT2Config
from untrusted import brief, check_safetensors_header, read_torch, refusing

WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
INDEXES = (f"{WEIGHTS}.index.json", f"{PICKLED_WEIGHTS}.index.json")
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
HEAD = "lm_head.weight"
BLOCK = re.compile(r"(?:transformer\.)?h\.(\d+)\.")
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # causal masks: derived, not trained
Readers = dict[str, Callable[[], Tensor]]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Fields that would make another function of the same tensors, and the one value computed here.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
ALIASES = {  # transformers takes either name
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
LARGEST = {"n_layer": 512} | dict.fromkeys(
    ("vocab_size", "n_positions", "n_embd", "n_head", "n_inner"), 1 << 20)


def load_gpt2(directory: Path) -> GPT2:
    """The model in a Hugging Face GPT-2 directory, in fp32 on the CPU, in evaluation mode.

    Strict: raises UserError that names a tensor which is missing, unexpected, of another shape
    or type, or not finite, and any config field that asks for another architecture.
    """
    directory = Path(directory)
    config, path = load_config(directory), weights_path(directory)
    with refusing(path):
        stored = _open(path)
    blocks = {match[1] for key in stored if (match := BLOCK.match(key))}
    if len(blocks) != config.n_layer:  # before a model of that depth is built
        raise UserError(f"{path}: holds {len(blocks)} blocks; "
                        f"config.json says n_layer {config.n_layer}")
    with torch.device("meta"):
        model = GPT2(config)
    model.load_state_dict(_read_parameters(path, stored, model), assign=True)
    return model.eval()


def _read_parameters(path: Path, stored: Readers, model: GPT2) -> dict[str, Tensor]:
    """The file's tensors as `model`'s parameters, each there once and as it should be."""
    needed = {name: p.shape for name, p in model.named_parameters()}
    shapes = {**needed, HEAD: needed["wte.weight"]}
    tensors: dict[str, Tensor] = {}
    for key, read in stored.items():
        name = key.removeprefix("transformer.")
        if MASK.match(name):
            continue
        if name not in shapes:
            raise UserError(f"{path}: unexpected tensor {key!r:.120}; "
                            "not a GPT-2 of this config.json")
        if name in tensors:
            raise UserError(f"{path}: holds {name} twice, with and without 'transformer.'")
        with refusing(path):
            tensor = read()
        tensors[name] = _as_parameter(path, key, tensor, shapes[name])
    head = tensors.pop(HEAD, None)  # a stored copy of the tied head, or the only one
    if head is not None and not torch.equal(head, tensors.setdefault("wte.weight", head)):
        raise UserError(f"{path}: {HEAD} differs from wte.weight; GPT-2's head is tied to it")
    if missing := sorted(needed.keys() - tensors.keys()):
        raise UserError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all)")
    return tensors


def has_weights(directory: Path) -> bool:
    """Also true of sharded weights: `load_gpt2` refuses them, and nobody takes them for none."""
    return any((Path(directory) / name).exists() for name in (WEIGHTS, PICKLED_WEIGHTS, *INDEXES))


def weights_path(directory: Path) -> Path:
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if (Path(directory) / name).exists():
            return Path(directory) / name
    for name in INDEXES:
        if (Path(directory) / name).exists():
            raise UserError(f"{directory}/{name}: sharded weights are not read; save one file with "
                            "transformers' save_pretrained(..., max_shard_size='100GB')")
    raise UserError(f"{directory}: holds neither {WEIGHTS} nor {PICKLED_WEIGHTS}")


def load_config(directory: Path) -> GPT2Config:
    """The architecture in `config.json`.

    Raises UserError for anything but a GPT-2 whose parameters the machine's memory holds.
    """
    path = Path(directory) / "config.json"
    stored = {ALIASES.get(name, name): value for name, value in read_json(path).items()}
    if stored.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {brief(stored.get('model_type'))}; "
                        "only 'gpt2' is known")
    for field, known in FIXED.items():
        if field in stored and stored[field] not in known:
            raise UserError(f"{path}: {field} {brief(stored[field])} is not supported, "
                            f"only {known[0]!r}")
    fields = {f.name: stored[f.name] for f in dataclasses.fields(GPT2Config) if f.name in stored}
    for field, value in fields.items():
        if problem := _problem(field, value):
            raise UserError(f"{path}: {field} {brief(value)} {problem}")
    config = GPT2Config(**fields)
    if config.n_embd % config.n_head:
        raise UserError(f"{path}: n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    if (size := 4 * _count_parameters(config)) > total_memory():
        raise UserError(f"{path}: asks for a model of {size / 1e9:,.0f} GB in fp32; this machine "
                        f"has {total_memory() / 1e9:,.0f} GB")
    return config


def _count_parameters(config: GPT2Config) -> int:
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    block = width * (4 * width + 2 * inner + 9) + inner  # 4 matrices' weights and biases, 2 norms
    return (config.vocab_size + config.n_positions + 2) * width + config.n_layer * block


def _problem(field: str, value: object) -> str | None:
    if field == "n_inner" and value is None:
        return None
    if field in LARGEST:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and 1 <= value <= LARGEST[field]:
            return None
        return f"is not a whole number from 1 to {LARGEST[field]}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and 0 <= value < 1 else "is not a number from 0 to below 1"


def _open(path: Path) -> Readers:
    """Each tensor's key and a way to read it, so that a large file is never held twice."""
    if path.suffix == ".safetensors":
        check_safetensors_header(path)
        file = safe_open(path, framework="pt")
        return {key: partial(file.get_tensor, key) for key in file.keys()}
    stored = read_torch(path, mapped=True)
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise UserError(f"{path}: holds no state dict")
    return {key: partial(stored.get, key) for key in stored}


def _as_parameter(path: Path, key: str, tensor: Tensor, shape: torch.Size) -> nn.Parameter:
    """A copy of our own, in fp32: the file may be replaced while we run."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
        raise UserError(f"{path}: {key} is not a tensor of fp32, fp16 or bf16 numbers")
    transposed = CONV1D.search(key) is not None
    expected = tuple(reversed(shape)) if transposed else tuple(shape)
    if tuple(tensor.shape) != expected:
        raise UserError(f"{path}: {key} is {tuple(tensor.shape)}; config.json says {expected}")
    value = torch.empty(shape)
    value.copy_(tensor.t() if transposed else tensor)
    if not torch.isfinite(torch.stack(value.aminmax())).all():  # a NaN anywhere is both
        raise UserError(f"{path}: {key} holds numbers that are not finite; the file is damaged")
    return nn.Parameter(value)


def save_gpt2(model: GPT2, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` in transformers' own layout, each atomically.

    The tied head is written once, as `transformer.wte.weight`. `dtype` None keeps each tensor's.
    Raises RunError, and writes nothing, when a number is not finite or not in reach of `dtype`.
    """
    directory = Path(directory)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu", dtype or parameter.dtype)
        if not torch.isfinite(value).all():
            raise RunError(f"{directory / WEIGHTS}: not written, since {name} holds numbers "
                           f"that are not finite in {value.dtype}")
        value = value.t() if CONV1D.search(name) else value
        tensors[f"transformer.{name}"] = value.contiguous()
    write_json(directory / "config.json", _hugging_face_config(model.config, value.dtype))
    with atomic_path(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _hugging_face_config(config: GPT2Config, dtype: torch.dtype) -> dict:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **dataclasses.asdict(config),
        "n_ctx": config.n_positions,
        "activation_function": "gelu_new",
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
