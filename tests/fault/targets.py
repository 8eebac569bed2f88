"""What the campaign damages, by the commands' own readers, and what a good answer is."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import torch

import evaluate
import plots
from data.tokens import encode, load_tokens
from errors import UserError
from lora.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from lora.inject import lora_layers
from model.checkpoint import CONV1D, load_gpt2
from model.gpt2 import GPT2
from model.tokenizer import load_tokenizer
from tests.adapters import ALL_FOUR, adapted
from tests.fault.mutate import mutate_bytes, mutate_json, mutate_text
from tests.fault.mutate_tensors import mutate_safetensors, mutate_torch
from tests.helpers import TINY, tiny_gpt2_directory
from tests.runs import story, trained
from training.checkpoint import content_sha256, read_checkpoint

VOCAB = TINY["vocab_size"]
MARKER = "code ran"
BOOK = story() + "“Naïve” 日本語\r\n\n  end"
CACHED = f"cache/{sha256(BOOK.encode()).hexdigest()[:32]}-{VOCAB}"


@dataclass(frozen=True)
class Target:
    """A file, what damages it, and a check of what its reader makes of it.

    `check` raises AssertionError for a wrong answer, UserError where the file is refused.
    """

    name: str
    file: str
    mutate: Callable[[Random, bytes, Path], bytes]
    check: Callable[[Path], None]


def prepare(directory: Path) -> None:
    """Good files of every kind; the targets' names are relative to `directory`."""
    base, _ = tiny_gpt2_directory(directory / "base")
    tensors = load_gpt2(base).state_dict()
    stored = {f"transformer.{name}": x.t().clone() if CONV1D.search(name) else x
              for name, x in tensors.items()}
    for name, zipped in (("pickled", True), ("legacy", False)):
        shutil.copytree(base, directory / name).joinpath("model.safetensors").unlink()
        torch.save(stored, directory / name / "pytorch_model.bin",
                   _use_new_zipfile_serialization=zipped)
    save_adapter(*adapted(base, ALL_FOUR, r=3), directory / "adapter", "gpt2")
    (directory / "book.txt").write_bytes(BOOK.encode())
    trained("lora", base, directory / "book.txt", directory / "run", "--max-steps", 2)
    load_tokens(directory / "book.txt", VOCAB, directory / "cache")
    good_base(directory)
    good_checkpoint(directory)


@lru_cache
def good_base(directory: Path) -> GPT2:
    return load_gpt2(directory / "base")


@lru_cache
def good_checkpoint(directory: Path) -> str:
    """The digest of its content."""
    return content_sha256(read_checkpoint(directory / "run")[0])


def check_adapter(directory: Path) -> None:
    model = GPT2(good_base(directory).config)
    config = load_adapter(model, directory / "adapter")
    layers = lora_layers(model)
    assert layers and 0 <= config.lora_alpha <= 1e6 and 0 <= config.lora_dropout <= 1
    stored = _safetensors((directory / "adapter" / WEIGHTS).read_bytes())
    for name, layer in layers.items():
        assert layer.lora_A.weight.shape == (config.r, layer.base_layer.in_features)
        for part in ("lora_A", "lora_B"):
            value = stored[f"base_model.model.transformer.{name}.{part}.weight"]
            assert value.isfinite().all()
            assert torch.equal(getattr(layer, part).weight, value.float())


def _safetensors(data: bytes) -> dict[str, torch.Tensor]:
    """The format as its description has it, by other code than the library's."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for key, entry in header.items():
        if key != "__metadata__" and entry["dtype"] in types:
            start, end = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(body[start:end]), dtype=types[entry["dtype"]])
            tensors[key] = flat.view(entry["shape"])
    return tensors


@torch.no_grad()
def check_base(directory: Path, name: str, same: bool = False) -> None:
    """A whole, finite model; with `same`, of the good file's parameters."""
    model = load_gpt2(directory / name)
    good = dict(good_base(directory).named_parameters())
    for key, value in model.named_parameters():
        assert value.isfinite().all() and value.dtype == torch.float32
        assert not same or torch.equal(value, good[key])
    if name == "base":
        stored = _safetensors((directory / "base" / "model.safetensors").read_bytes())
        for key, value in stored.items():
            ours = model.get_parameter(key.removeprefix("transformer.").replace("lm_head", "wte"))
            assert torch.equal(ours, value.t() if CONV1D.search(f".{key}") else value)


def check_checkpoint(directory: Path) -> None:
    """What is believed is what was written."""
    state, _ = read_checkpoint(directory / "run")
    assert content_sha256(state) == good_checkpoint(directory)


def check_book(directory: Path) -> None:
    cache = directory / "fresh cache"
    try:
        tokens = load_tokens(directory / "book.txt", VOCAB, cache)
        text = (directory / "book.txt").read_bytes().decode("utf-8-sig")
        assert np.array_equal(tokens, encode(load_tokenizer(VOCAB), text))
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def check_cache(directory: Path) -> None:
    tokens = load_tokens(directory / "book.txt", VOCAB, directory / "cache")
    assert np.array_equal(tokens, encode(load_tokenizer(VOCAB), BOOK))


def check_run(directory: Path, drawn: bool = False) -> None:
    """The table, and seldom (it takes half a second) the picture."""
    printed, pyplot = io.StringIO(), plots.pyplot
    plots.pyplot = pyplot if drawn else None
    try:
        with contextlib.redirect_stdout(printed):
            evaluate.compare([directory / "run"])
    finally:
        plots.pyplot = pyplot
    lines = printed.getvalue().encode().decode().split("\n")  # surrogates would not encode
    assert all(line.isprintable() for line in lines)
    assert not any(re.search(r"\| +(nan|inf) ", line) for line in lines)


def _plain(mutate: Callable[[Random, bytes], bytes]) -> Callable[[Random, bytes, Path], bytes]:
    return lambda rng, data, marker: mutate(rng, data)


TARGETS = (
    Target("adapter weights", f"adapter/{WEIGHTS}", _plain(mutate_safetensors), check_adapter),
    Target("adapter config", f"adapter/{CONFIG}", _plain(mutate_json), check_adapter),
    Target("base config", "base/config.json", _plain(mutate_json),
           partial(check_base, name="base", same=True)),
    Target("base weights", "base/model.safetensors", _plain(mutate_safetensors),
           partial(check_base, name="base")),
    Target("pickled weights", "pickled/pytorch_model.bin", mutate_torch,
           partial(check_base, name="pickled")),
    Target("legacy weights", "legacy/pytorch_model.bin", mutate_torch,
           partial(check_base, name="legacy")),
    Target("run checkpoint", "run/checkpoint.pt", mutate_torch, check_checkpoint),
    Target("book", "book.txt", _plain(mutate_text), check_book),
    Target("cached tokens", f"{CACHED}.bin", _plain(mutate_bytes), check_cache),
    Target("cache description", f"{CACHED}.json", _plain(mutate_json), check_cache),
    Target("run report", "run/run.json", _plain(mutate_json), check_run),
    Target("run report, drawn", "run/run.json", _plain(mutate_json),
           partial(check_run, drawn=True)),
)


def problem_of(target: Target, directory: Path) -> str | None:
    """What is wrong with how the target's reader meets the file that stands there."""
    marker = directory / MARKER
    try:
        target.check(directory)
    except UserError as error:
        message = str(error)
        if not message.startswith(str(directory)) or not message.isprintable():
            return f"says {message!r:.200}"
        if len(message) > 600:
            return f"says too much: {len(message)} characters"
        if _out_of_memory(error):
            return "asks for too much memory"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    if marker.exists():
        marker.unlink()
        return "ran the file's code"
    return None


def _out_of_memory(error: BaseException | None) -> bool:
    while error:
        if isinstance(error, MemoryError) or "alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
