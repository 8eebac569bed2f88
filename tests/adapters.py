"""Models whose adapters look trained, ours and PEFT's, and adapters that are refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from errors import UserError
from lora.adapter import load_adapter
from lora.config import LoRAConfig
from lora.inject import inject
from model.checkpoint import load_gpt2
from model.gpt2 import GPT2
from tests.helpers import token_ids

ALL_FOUR = ("c_attn", "c_proj", "c_fc")  # c_proj is two of them


def randomize(model: nn.Module, seed: int = 2) -> None:
    """N(0, 0.2) into every A and B, ours or PEFT's, as training would: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)


def adapted(base: Path, targets: tuple[str, ...] = ALL_FOUR,
            dtype: torch.dtype = torch.float32, **config: object) -> tuple[GPT2, LoRAConfig]:
    """The model in `base`, cast to `dtype`, with a random adapter, and the adapter's config."""
    model = load_gpt2(base).to(dtype)
    lora_config = LoRAConfig(target_modules=targets, **config)
    inject(model, lora_config)
    randomize(model)
    return model, lora_config


def refusal_of(adapter: Path, file: str, base: Path) -> str:
    """What is said of the adapter's `file`, in one line; the model computes what its base does."""
    model = load_gpt2(base)
    ids = token_ids(model.config.vocab_size, 1, 8)
    expected = model(ids)
    with pytest.raises(UserError) as refusal:
        load_adapter(model, adapter)
    assert torch.equal(model(ids), expected)
    path, _, reason = str(refusal.value).partition(": ")
    assert path == str(adapter / file)
    assert len(reason.splitlines()) == 1 and len(reason) < 300
    return reason
