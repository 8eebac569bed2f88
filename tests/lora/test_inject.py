"""Check injection into GPT-2: the number of parameters, and switching the adapter off."""

import math

import pytest
import torch

from lora.inject import adapter_disabled, inject
from lora.layer import LoRAConfig
from lora.merge import merge
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
    assert torch.equal(model(IDS), with_adapter)
    merge(model)
    with pytest.raises(ValueError, match="unmerge it first"), adapter_disabled(model):
        pass


NAN = float("nan")
IMPOSSIBLE = {
    "r": (0, -1, 2.5, True, None, "8", 1 << 21),
    "lora_alpha": (NAN, math.inf, -1, "16", None),
    "lora_dropout": (NAN, -0.1, 1.1, None),
    "target_modules": ((), [], {"c_attn"}, None, 3, ["c_attn", 3], "c_(", "x{99999999999}"),
    "use_rslora": (1, None),
    "use_dora": (1, "yes"),
    "init_lora_weights": (False, 1, None, "gaussian", "PiSSA"),
    "layers_to_transform": (True, 1.0, "1", {1}, [0, "1"]),
    "layers_pattern": (1, ["h", 1], "(h"),
    "rank_pattern": (None, [], {"c_attn": 0}, {"c_attn": 2.5}, {3: 2}, {"c_(": 2}),
    "alpha_pattern": (None, {"c_attn": NAN}, {"c_attn": "1"}, {"(?P<\n>)": 1}),
}


def test_an_impossible_config_is_refused_at_once_by_field_and_value():
    for field, values in IMPOSSIBLE.items():
        for value in values:
            fields = {"layers_to_transform": 0, field: value}
            with pytest.raises(ValueError, match=f"^{field} .* is not ") as refused:
                LoRAConfig(**fields)
                pytest.fail(f"{field}={value!r} is taken")
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 200
    for fields in (
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "lora_alpha": 0},
        {"layers_pattern": ("h",), "layers_to_transform": None},
        {"layers_to_transform": (0,), "target_modules": "all-linear"},
    ):
        with pytest.raises(ValueError) as refused:
            LoRAConfig(**fields)
        assert all(field in str(refused.value) for field in fields)


def test_a_config_is_given_as_to_peft():
    """Lists, and single values where PEFT takes them, are the tuples of the config."""
    given = LoRAConfig(target_modules=["c_fc"], layers_to_transform=0, layers_pattern="h")
    assert given == LoRAConfig(
        target_modules=("c_fc",), layers_to_transform=(0,), layers_pattern=("h",)
    )
    assert LoRAConfig(layers_to_transform=range(2)).layers_to_transform == (0, 1)
    assert LoRAConfig(layers_to_transform=[], layers_pattern="") == LoRAConfig()
