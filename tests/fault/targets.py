"""The files that the campaign damages, each with a reader and a check of the result."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, as_failure
from data.tokenizer import FAST, load_tokenizer
from data.tokens import load_tokens
from lora.inject import lora_layers
from lora.load import load_adapter
from lora.peft_config import CONFIG
from lora.save import WEIGHTS, save_adapter
from storage.weights import CONV1D, load_gpt2
from tests.fault.mutate import mutate_json, mutate_safetensors, mutate_text
from tests.fault.runs import BOOK
from tests.helpers import TINY, small_tokenizer, tiny_gpt2_directory
from tests.pairs import adapted
from tests.runs import trained
from training.checkpoint import CHECKPOINT, PREVIOUS, read_checkpoint, write_checkpoint

VOCAB = TINY["vocab_size"]
TEXT = BOOK[:5000] + "“Naïve” 日本語\r\n\n  end"
TOKENIZER = small_tokenizer(VOCAB)


@dataclass(frozen=True)
class Target:
    """A file, its mutator, and its reader's check: AssertionError for a wrong result."""

    name: str
    file: str
    mutate: Callable[[Random, bytes], bytes]
    check: Callable[[Path], None]


def prepare(directory: Path) -> None:
    """Write good files of every kind. The targets' names are relative to `directory`."""
    torch.set_num_threads(1)  # a larger pool does not survive the reader's fork
    base, _ = tiny_gpt2_directory(directory / "base")
    save_adapter(adapted(base, r=3), directory / "adapter", "gpt2", "0" * 64)
    (directory / "book.txt").write_bytes(TEXT.encode())
    trained("lora", base, directory / "book.txt", directory / "run", "--max-steps", 1)
    (directory / "run" / PREVIOUS).unlink()  # would replace a damaged checkpoint
    shutil.copy(directory / "run" / CHECKPOINT, directory / "saved")
    for target in TARGETS:  # the first call also pays for imports
        target.check(directory)


def check_adapter(directory: Path) -> None:
    model = load_gpt2(directory / "base")
    with as_failure():
        config = load_adapter(model, directory / "adapter")
    layers = lora_layers(model)
    stored = _safetensors(directory / "adapter" / WEIGHTS)
    assert layers and 0 <= config.lora_alpha <= 3e6 and 0 <= config.lora_dropout <= 1
    for name, layer in layers.items():
        assert layer.lora_A.weight.shape == (config.r, layer.base_layer.in_features)
        for part in ("lora_A", "lora_B"):
            value = stored[f"base_model.model.transformer.{name}.{part}.weight"]
            assert value.isfinite().all() and getattr(layer, part).weight.equal(value.float())


def check_base(directory: Path) -> None:
    model = load_gpt2(directory / "base")
    stored = {}
    for key, value in _safetensors(directory / "base" / "model.safetensors").items():
        stored[key.removeprefix("transformer.")] = value
    stored.setdefault("wte.weight", stored.get("lm_head.weight"))
    for name, ours in model.named_parameters():
        value = stored[name].float()
        if CONV1D.search(name):
            value = value.t()
        assert value.isfinite().all() and ours.dtype == torch.float32
        assert ours.equal(value)


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Read the format by its specification, without the library."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    header.pop("__metadata__", None)
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] in types:
            begin, end = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(body[begin:end]), dtype=types[entry["dtype"]])
            tensors[key] = flat.view(entry["shape"])
    return tensors


def check_checkpoint(directory: Path) -> None:
    """Only the written values are accepted, in any order of the header."""
    write_checkpoint(directory, read_checkpoint(directory / "run"))
    assert (directory / CHECKPOINT).read_bytes() == (directory / "saved").read_bytes()


def check_tokens(directory: Path) -> None:
    tokens = load_tokens(directory / "book.txt", TOKENIZER)
    text = (directory / "book.txt").read_text(encoding="utf-8-sig")
    assert np.array_equal(tokens.ids, TOKENIZER.encode(text))


def check_tokenizer(directory: Path) -> None:
    """Every id is in the model's vocabulary, and the tokens cover at most the text."""
    tokenizer = load_tokenizer(directory / "base", VOCAB)
    try:
        ids, byte_counts = tokenizer.encode_with_bytes(TEXT)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error  # raised for a text, without the file
    assert all(token < VOCAB for token in ids.tolist())
    assert byte_counts.sum() <= len(TEXT.encode())


TARGETS = (
    Target("adapter weights", f"adapter/{WEIGHTS}", mutate_safetensors, check_adapter),
    Target("adapter config", f"adapter/{CONFIG}", mutate_json, check_adapter),
    Target("base config", "base/config.json", mutate_json, check_base),
    Target("base weights", "base/model.safetensors", mutate_safetensors, check_base),
    Target("run checkpoint", f"run/{CHECKPOINT}", mutate_safetensors, check_checkpoint),
    Target("tokenizer", f"base/{FAST}", mutate_json, check_tokenizer),
    Target("book", "book.txt", mutate_text, check_tokens),
)


def problem_of(target: Target, directory: Path) -> str | None:
    """Return the problem of reading the file at the target's path, or None."""
    try:
        target.check(directory)
    except UserError as error:
        message = str(error)
        if not message.startswith(str(directory)) or not message.isprintable():
            return f"says {message!r:.200}"
        if len(message) > 600:
            return f"says too much: {len(message)} characters"
        cause = error.__cause__ or error.__context__
        while cause:
            if isinstance(cause, MemoryError) or "alloc" in str(cause):
                return "asks for too much memory"
            cause = cause.__cause__ or cause.__context__
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return None
