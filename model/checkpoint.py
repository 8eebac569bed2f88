"""Hugging Face GPT-2 directories: read every shape they come in, write the one transformers loads.

Files on the hub name tensors `h.0.ln_1.weight` and carry the causal masks; transformers itself
writes `transformer.h.0.ln_1.weight`, with or without a copy of the tied head. In all of them
the four projections are Conv1D weights, (in, out); `nn.Linear` here holds (out, in).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from files import atomic_path, read_json, write_json
from model.gpt2 import GPT2, GPT2Config

WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # causal masks: derived, not trained
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Fields that would make another function of the same tensors, and the one value computed here.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
LARGEST_SIZE = 1 << 20


def load_gpt2(directory: Path) -> GPT2:
    """The model in a Hugging Face GPT-2 directory, in fp32 on the CPU, in evaluation mode.

    Strict: raises UserError that names a tensor which is missing, unexpected, of another shape
    or type, or not finite, and any config field that asks for another architecture.
    """
    directory = Path(directory)
    with torch.device("meta"):
        model = GPT2(load_config(directory))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    path = weights_path(directory)
    for key, read in _open(path):
        name = key.removeprefix("transformer.")
        if MASK.match(name):
            continue
        if name == "lm_head.weight":
            name = "wte.weight"  # a stored copy of the tied head
        if name not in shapes:
            raise UserError(f"{path}: unexpected tensor {key}; not a GPT-2 of this config.json")
        transposed = CONV1D.search(name) is not None
        tensor = _as_parameter(path, key, read(), shapes[name], transposed)
        if name in tensors and not torch.equal(tensor, tensors[name]):
            raise UserError(f"{path}: {key} differs from wte.weight; GPT-2's head is tied to it")
        tensors[name] = tensor
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all)")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def has_weights(directory: Path) -> bool:
    return any((Path(directory) / name).exists() for name in (WEIGHTS, PICKLED_WEIGHTS))


def weights_path(directory: Path) -> Path:
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if (Path(directory) / name).exists():
            return Path(directory) / name
    raise UserError(f"{directory}: holds neither {WEIGHTS} nor {PICKLED_WEIGHTS}")


def load_config(directory: Path) -> GPT2Config:
    """The architecture in `config.json`. Raises UserError for anything but a GPT-2."""
    path = Path(directory) / "config.json"
    stored = read_json(path)
    if stored.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {stored.get('model_type')!r}; only 'gpt2' is known")
    for field, known in FIXED.items():
        if field in stored and stored[field] not in known:
            raise UserError(f"{path}: {field} {stored[field]!r} is not supported, "
                            f"only {known[0]!r}")
    fields = {f.name: stored[f.name] for f in dataclasses.fields(GPT2Config) if f.name in stored}
    for field, value in fields.items():
        if problem := _problem(field, value):
            raise UserError(f"{path}: {field} {value!r} {problem}")
    config = GPT2Config(**fields)
    if config.n_embd % config.n_head:
        raise UserError(f"{path}: n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    return config


def _problem(field: str, value: object) -> str | None:
    if field == "n_inner" and value is None:
        return None
    if field in (*SIZES, "n_inner"):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and 1 <= value <= LARGEST_SIZE else "is not a size"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and 0 <= value < 1 else "is not a number from 0 to below 1"


def _open(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each tensor's key and a way to read it, so that a large file is never held twice."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    yield key, lambda key=key: file.get_tensor(key)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(stored, dict):
                raise ValueError("not a state dict")
            for key, tensor in stored.items():
                yield str(key), lambda tensor=tensor: tensor
    except UserError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from error
    except Exception as error:  # torch.load raises whatever its unpickler meets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a file of plain tensors ({reason})") from error


def _as_parameter(
    path: Path, key: str, tensor: Tensor, shape: torch.Size, transposed: bool
) -> torch.nn.Parameter:
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
        raise UserError(f"{path}: {key} is not a tensor of fp32, fp16 or bf16 numbers")
    expected = tuple(reversed(shape)) if transposed else tuple(shape)
    if tuple(tensor.shape) != expected:
        raise UserError(f"{path}: {key} is {tuple(tensor.shape)}; config.json says {expected}")
    value = torch.empty(shape)  # a copy of our own: the file may be replaced while we run
    value.copy_(tensor.t() if transposed else tensor)
    if not torch.isfinite(value).all():
        raise UserError(f"{path}: {key} holds numbers that are not finite; the file is damaged")
    return torch.nn.Parameter(value)


def save_gpt2(model: GPT2, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` in transformers' own layout, each atomically.

    The tied head is written once, as `transformer.wte.weight`. `dtype` None keeps each tensor's.
    """
    directory = Path(directory)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu", dtype or parameter.dtype)
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
