"""Make small stock transformers models, compare tensors, and check refusals."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from common.figures import can_draw
from data.tokenizer import END_OF_TEXT, FAST, GPT2_FILES, SETTINGS, Tokenizer, load_tokenizer
from evaluation import compare
from training import report

transformers.logging.disable_progress_bar()

DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # conftest.py sets it from --device
# Relative tolerance between two orders of sums in fp32. A GPU's kernels use other orders.
FP32_CLOSE = 1e-6 if DEVICE == "cpu" else 1e-5

TINY = {
    "vocab_size": 317,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "activation_function": "gelu_pytorch_tanh",
}


def tiny_gpt2(seed: int = 0, **config: object) -> transformers.GPT2LMHeadModel:
    """Return a stock GPT-2 in evaluation mode with random parameters. `config` overrides `TINY`.

    Biases and LayerNorms are random too: with their initial values, no test would notice a loss.
    """
    fields = {**TINY, **config}
    end = fields["vocab_size"] - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**fields, bos_token_id=end, eos_token_id=end)
        )
        perturb(model)
    return model.eval()


def perturb(model: nn.Module, std: float = 0.1) -> None:
    """Add N(0, std) to every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * std


def tiny_gpt2_directory(
    directory: Path, seed: int = 0, **config: object
) -> tuple[Path, transformers.GPT2LMHeadModel]:
    """Save `tiny_gpt2` with transformers, and a tokenizer. Return the directory and the model."""
    model = tiny_gpt2(seed, **config)
    model.save_pretrained(directory)
    write_small_tokenizer(Path(directory), model.config.vocab_size)
    return Path(directory), model


@cache
def small_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer with GPT-2's first ranks and `<|endoftext|>`."""
    with TemporaryDirectory() as directory:
        write_small_tokenizer(Path(directory), vocab_size)
        return load_tokenizer(directory, vocab_size)


def write_small_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write `small_tokenizer`'s files."""
    (directory / FAST).write_text(_small_tokenizer_json(vocab_size))
    shutil.copy(GPT2_FILES / SETTINGS, directory)


@cache
def _small_tokenizer_json(vocab_size: int) -> str:
    """Return GPT-2's `tokenizer.json`, cut. Each rank merges two lower ranks."""
    stored = json.loads((GPT2_FILES / FAST).read_text())
    model = stored["model"]
    end = vocab_size - 1
    words = {word: i for word, i in model["vocab"].items() if i < end}
    model["vocab"] = words | {END_OF_TEXT: end}
    model["merges"] = model["merges"][: end - 256]
    stored["added_tokens"][0]["id"] = end
    return json.dumps(stored)


def token_ids(vocab_size: int, *shape: int, seed: int = 1) -> torch.Tensor:
    """Return seeded random token ids of this shape."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative_difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest reference value."""
    value = value.detach().double()
    reference = reference.detach().double()
    return ((value - reference).abs().max() / reference.abs().max()).item()


class Operations(TorchDispatchMode):
    """Record the name of every PyTorch operation inside the `with`, except views and `empty`.

    On a GPU each of them would launch at least one kernel.
    """

    VIEWS = ("as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze")
    FREE = ("_unsafe_view", "alias", "empty", "empty_like", "t", "transpose", "unsqueeze", "view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0  # bytes of the largest result

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name not in (*self.VIEWS, *self.FREE):
            self.names.append(name)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def refusal(name: object, read: Callable, *arguments: object) -> str:
    """Return the reason, without the name, when `read` refuses its arguments (default: the name).

    The message must be one printable line.
    """
    with pytest.raises((UserError, ValueError)) as refused:
        read(*arguments or (name,))
    message = str(refused.value)
    assert message.startswith(str(name)), message
    assert message.isprintable() and len(message) < 800, message
    return message.removeprefix(str(name)).removeprefix(": ")


@contextmanager
def drawing(draw: Callable[[], bool] = can_draw) -> Iterator[None]:
    """Draw a run's pictures in a `with` or for a whole test. conftest.py switches drawing off."""
    with (
        mock.patch.object(report, "can_draw", draw),
        mock.patch.object(compare, "can_draw", draw),
    ):
        yield
