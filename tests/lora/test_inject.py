"""Check injection into GPT-2: the trained parameters, their number, and the frozen rest."""

import pytest
import torch

from lora.inject import adapter_disabled, inject
from lora.layer import LoRAConfig
from lora.merge import merge
from lora.variants import make_config
from model.gpt2 import GPT2, GPT2Config
from storage.weights import load_gpt2
from tests.helpers import relative_difference
from tests.pairs import ALL_FOUR, IDS, adapted, losses_of_steps
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


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.float16, False)])
def test_a_new_adapter_changes_no_logit_and_training_moves_a_and_b_alone(base, dtype, autocast):
    model = load_gpt2(base).to(dtype)
    expected = model(IDS)
    torch.manual_seed(0)
    inject(model, LoRAConfig(target_modules=ALL_FOUR))
    assert torch.equal(model(IDS), expected)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = losses_of_steps(model, IDS, 4, autocast=autocast)
    assert losses[3] < losses[2] < losses[1] < losses[0]
    assert relative_difference(model(IDS), expected) > 0.1
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name
        assert torch.equal(parameter, before[name]) is not trained, name
        assert (parameter.grad is not None) is trained is parameter.requires_grad, name


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
