"""Check injection into GPT-2: the number of parameters, and switching the adapter off."""

import pytest
import torch

from lora.inject import adapter_disabled, inject
from lora.layer import LoRAConfig
from lora.merge import merge
from lora.variants import make_config
from model.gpt2 import GPT2, GPT2Config
from storage.weights import load_gpt2
from tests.helpers import relative_difference
from tests.pairs import IDS, adapted
from training.report import describe_parameters


def test_counts_of_the_released_sizes():
    """Count the default adapter's parameters on the smallest and the largest GPT-2."""
    for size, trainable, total, percent in (
        ({}, "294,912", "124,734,720", "0.2364"),
        ({"n_embd": 1600, "n_layer": 48}, "2,457,600", "1,560,068,800", "0.1575"),
    ):
        with torch.device("meta"):
            model = GPT2(GPT2Config(n_head=1, **size))
            inject(model, LoRAConfig())
        assert describe_parameters(model) == (
            f"trainable params: {trainable} || all params: {total} || trainable%: {percent}"
        )


def test_a_disabled_adapter_leaves_the_base_and_a_second_one_is_refused(base):
    model = adapted(base)
    with_adapter = model(IDS)
    without = load_gpt2(base)(IDS)
    assert relative_difference(with_adapter, without) > 0.1
    with pytest.raises(KeyError), adapter_disabled(model):
        assert torch.equal(model(IDS), without)
        with adapter_disabled(model):
            pass
        assert torch.equal(model(IDS), without)  # the inner block does not change the outer block
        raise KeyError
    assert torch.equal(model(IDS), with_adapter)
    with pytest.raises(ValueError, match="has an adapter already; `unwrap` it first"):
        inject(model, LoRAConfig(target_modules=("c_fc",)))
    with pytest.raises(ValueError, match="init_lora_weights 'gaussian' is not supported"):
        make_config(init_lora_weights="gaussian")
    assert torch.equal(model(IDS), with_adapter)
    merge(model)
    with pytest.raises(ValueError, match="unmerge it first"), adapter_disabled(model):
        pass
