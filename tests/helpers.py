"""Make small stock transformers models for the tests, and compare tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from common.errors import UserError
from model.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer
from model.tokenizer_files import save_tokenizer
from model.weights import load_gpt2

transformers.logging.disable_progress_bar()

TINY = {
    "vocab_size": 317,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "activation_function": "gelu_pytorch_tanh",
}


def tiny_gpt2(seed: int = 0, **config: object) -> transformers.GPT2LMHeadModel:
    """A stock GPT-2 in evaluation mode, random in every parameter; `config` changes `TINY`.

    A bias at its initial 0, or a LayerNorm at 1, could be lost and nobody would notice.
    """
    fields = {**TINY, **config}
    end = fields["vocab_size"] - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**fields, bos_token_id=end, eos_token_id=end))
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
    """`tiny_gpt2` saved by transformers itself, with a tokenizer; returns directory and model."""
    model = tiny_gpt2(seed, **config)
    model.save_pretrained(directory)
    save_tokenizer(small_tokenizer(model.config.vocab_size), Path(directory))
    return Path(directory), model


def small_tokenizer(vocab_size: int) -> Tokenizer:
    """GPT-2's first ranks and `<|endoftext|>`: each is a merge of two lower ones."""
    whole, end = gpt2_tokenizer(), vocab_size - 1
    return replace(whole, merges=whole.merges[:end], ids=whole.ids[:end],
                   special={END_OF_TEXT: end}, end_of_text=end, vocab_size=vocab_size)


def token_ids(vocab_size: int, *shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids of that shape, seeded."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative_difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference, as a share of the largest reference value."""
    value, reference = value.detach().double(), reference.detach().double()
    return ((value - reference).abs().max() / reference.abs().max()).item()


def assert_refused(directory: Path, file: str, *words: str) -> str:
    """Loading the model fails with one line that begins with the file's path and has the words.

    Returns that line.
    """
    with pytest.raises(UserError) as refusal:
        load_gpt2(directory)
    message = str(refusal.value)
    assert message.startswith(str(directory / file))
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    return message
