"""Write a model or an adapter as a GGUF file for llama.cpp, with the package `gguf`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import RunError, UserError
from data.tokenizer import Tokenizer
from lora import lora_layers
from lora.peft_view import peft_view
from lora.tensors import is_finite
from model.gpt2 import GPT2, GPT2Config

# Names of tensor types and of file types in `gguf`.
TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
SUFFIXES = (".weight", ".bias", ".weight.lora_a", ".weight.lora_b")


def refuse_erf_gelu(config: GPT2Config, base: str) -> None:
    """Raise UserError for a config that llama.cpp would load without an error but compute
    differently."""
    if config.activation_function == "gelu":
        raise UserError(
            f"{base}: config.json has activation_function gelu, but llama.cpp computes another "
            "GELU for every GPT-2"
        )


def save_gguf(
    model: GPT2,
    tokenizer: Tokenizer,
    path: Path,
    name: str,
    dtype: torch.dtype,
    chat_template: str | None = None,
) -> None:
    """Write a whole model: matrices (out, in) in `dtype`, the tokenizer, and the chat template
    (default: the template of the tokenizer, if any).

    Raises UserError for a tokenizer that is not a byte-level BPE with GPT-2's pattern.
    """
    gguf = _library()
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _add_tokenizer(writer, tokenizer, config.vocab_size, chat_template)
    _write(writer, model.named_parameters(), config.n_layer, dtype)


def save_adapter_gguf(model: GPT2, path: Path, name: str, dtype: torch.dtype) -> None:
    """Write only the adapter of a model: scaling * B (out, rank) and A (rank, in) of each layer.

    llama.cpp adds alpha / rank * B A x, with one alpha and one rank for all layers. So zeros pad A
    and B to the largest rank, and the file gets alpha = rank, because B already includes the
    scaling.
    """
    layers = lora_layers(model)
    rank = max(layer.config.r for layer in layers.values())
    gguf = _library()
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    tensors: dict[str, Tensor] = {}
    for layer_name, layer in layers.items():
        key = f"{peft_view(model).prefix}{layer_name}.weight"
        more = rank - layer.config.r
        tensors[f"{key}.lora_a"] = F.pad(layer.lora_A.weight, (0, 0, 0, more))
        tensors[f"{key}.lora_b"] = F.pad(layer.scaling * layer.lora_B.weight, (0, more))
    _write(writer, tensors.items(), model.config.n_layer, dtype)


def _write(
    writer: Any, tensors: Iterable[tuple[str, Tensor]], n_layer: int, dtype: torch.dtype
) -> None:
    """Write matrices in `dtype`. Write vectors in fp32, because llama.cpp needs fp32 vectors."""
    gguf = _library()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, n_layer)
    for name, tensor in tensors:
        stored = dtype if tensor.ndim > 1 else torch.float32
        value = tensor.detach().to("cpu", stored).contiguous()
        if not is_finite(value):
            raise RunError(f"{name} has numbers that are not finite in {stored}; not written")
        kind = gguf.GGMLQuantizationType[TENSOR_TYPES[stored]]
        data = value.view(torch.uint8).numpy()  # numpy has no bf16
        writer.add_tensor(names.get_name(name, SUFFIXES), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(
    writer: Any, tokenizer: Tokenizer, vocab_size: int, chat_template: str | None
) -> None:
    """Add the tokens (byte-level characters), their types, the merges and the chat template."""
    types = _library().TokenType
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    stored = tokenizer.definition
    if settings.get("add_prefix_space") or not _is_gpt2s(stored):
        raise UserError(
            f"{tokenizer.source}: the tokenizer is not a byte-level BPE with GPT-2's pattern; "
            "try llama.cpp's convert_hf_to_gguf.py"
        )

    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [types.UNUSED] * vocab_size
    for word, i in stored["model"]["vocab"].items():
        tokens[i] = word
        kinds[i] = types.NORMAL
    for added in stored.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = types.CONTROL
    end = tokenizer.end_of_text
    if end is not None:
        kinds[end] = types.CONTROL
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the pattern that splits a text into words
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)

    own = tokenizer.files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    template = chat_template or own
    if isinstance(template, str):  # some tokenizer_config.json files contain a list of templates
        writer.add_chat_template(template)


def _is_gpt2s(stored: Mapping[str, Any]) -> bool:
    """Return whether a `tokenizer.json` is a byte-level BPE with GPT-2's pattern."""
    model = stored["model"]
    step = stored.get("pre_tokenizer") or {}
    changes = (
        stored.get("normalizer"),
        model.get("continuing_subword_prefix"),
        model.get("end_of_word_suffix"),
        model.get("ignore_merges"),
        step.get("add_prefix_space"),
    )
    is_byte_level = step.get("type") == "ByteLevel" and step.get("use_regex", True)
    return model.get("type", "BPE") == "BPE" and is_byte_level and not any(changes)


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError("gguf is not installed; pip install -e '.[gguf]'") from error
    return gguf
