"""A GPT-2 as llama.cpp reads it: the names of its tensors, its metadata and its tokenizer."""

import json
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import brief
from data.tokenizer import LibraryTokenizer, Tokenizer
from data.tokenizer_files import FAST, MERGES, SETTINGS, TEMPLATE, VOCAB, is_gpt2s
from model.gpt2 import GPT2, GPT2Config
from storage.gguf_format import Value, write_gguf

ARCHITECTURE = "gpt2"
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# llama.cpp's numbers for kinds of tokens.
NORMAL = 1
CONTROL = 3
UNUSED = 5


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a module: `h.3.attn.c_attn` -> `blk.3.attn_qkv`."""
    if not name.startswith("h."):
        return NAMES[name]
    _, block, own = name.split(".", 2)
    return f"blk.{block}.{NAMES[own]}"


def refuse_unknown_fields(config: GPT2Config, base: str) -> None:
    """Raise UserError for what llama.cpp's GPT-2 does not know, and would leave out in silence."""
    known = {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    }
    for field, values in known.items():
        value = getattr(config, field)
        if value not in values:
            raise UserError(
                f"{base}: its config.json has {field} {brief(value)}, which llama.cpp's GPT-2 does "
                "not know; it would compute something else"
            )


def save_gguf(
    model: GPT2,
    tokenizer: Tokenizer,
    path: Path,
    name: str,
    dtype: torch.dtype,
    chat_template: str | None = None,
) -> None:
    """Write a whole model: matrices in `dtype`, (out, in), the tokenizer, and the template of
    conversations (default: the tokenizer's, if it has one).

    Raises UserError for a tokenizer that is not a byte-pair encoding with GPT-2's pattern.
    """
    metadata: dict[str, Value] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
        **_sizes(model.config),
        **_vocabulary(tokenizer),
    }
    template = chat_template or _chat_template(tokenizer)
    if template:
        metadata["tokenizer.chat_template"] = template
    tensors: dict[str, Tensor] = {}
    for parameter, value in model.named_parameters():
        module, _, part = parameter.rpartition(".")
        tensors[f"{gguf_name(module)}.{part}"] = value
    write_gguf(path, metadata, tensors, dtype)


def _sizes(config: GPT2Config) -> dict[str, Value]:
    return {
        "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.n_inner or 4 * config.n_embd,
        "gpt2.block_count": config.n_layer,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Value]:
    """Return every token, as byte-level characters, its kind, and the merges in rank order."""
    vocab, merges = _byte_pairs(tokenizer)
    tokens: list[str] = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    kinds = [UNUSED] * tokenizer.vocab_size
    for word, i in vocab.items():
        tokens[i] = word
        kinds[i] = NORMAL
    for i in tokenizer.special.values():
        tokens[i] = tokenizer.bytes_of[i].decode()
        kinds[i] = CONTROL

    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",  # the pattern that splits a text into words
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    if tokenizer.end_of_text is not None:
        metadata["tokenizer.ggml.bos_token_id"] = tokenizer.end_of_text
        metadata["tokenizer.ggml.eos_token_id"] = tokenizer.end_of_text
    return metadata


def _chat_template(tokenizer: Tokenizer) -> str | None:
    """Return the template in the tokenizer's files: one of its own, or a field of the settings."""
    if TEMPLATE in tokenizer.files:
        return tokenizer.files[TEMPLATE].decode()
    settings = json.loads(tokenizer.files.get(SETTINGS, b"{}"))
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None  # some settings list several


def _byte_pairs(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str]]:
    """Return the vocabulary and the pairs of words that are merged, "a b".

    Raises UserError unless the tokenizer is a byte-pair encoding with GPT-2's pattern.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        stored = json.loads(tokenizer.engine.to_str())
        if not is_gpt2s(stored):
            raise UserError(
                f"{tokenizer.source}: its tokenizer is no byte-pair encoding with GPT-2's pattern; "
                "llama.cpp's own convert_hf_to_gguf.py may know it"
            )
    elif FAST in tokenizer.files:
        stored = json.loads(tokenizer.files[FAST])
    else:
        return json.loads(tokenizer.files[VOCAB]), _lines(tokenizer.files[MERGES])
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]
    ]
    return stored["model"]["vocab"], merges


def _lines(merges: bytes) -> list[str]:
    """Return the pairs in a merges.txt."""
    lines = merges.decode().splitlines()
    return [line for line in lines if line and not line.startswith("#version")]
