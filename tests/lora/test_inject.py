"""Check injection into GPT-2: counts, switching the adapter off, wrappers, wrong configs."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora.config import LoRAConfig
from lora.inject import adapter_disabled, inject, lora_layers
from lora.load import load_adapter
from lora.merge import merge, unwrap
from lora.save import save_adapter
from model.gpt2 import GPT2, GPT2Config
from storage.weights import load_gpt2
from tests.helpers import relative_difference
from tests.pairs import IDS, adapted
from tests.runs import contents
from training.report import describe_parameters


def test_counts_of_the_released_sizes():
    """Count the reference run's parameters on the smallest and the largest GPT-2."""
    for size, trainable, total, percent in (
        ({}, "294,912", "124,734,720", "0.2364"),
        ({"n_embd": 1600, "n_layer": 48}, "2,457,600", "1,560,068,800", "0.1575"),
    ):
        with torch.device("meta"):
            model = GPT2(GPT2Config(n_head=1, **size))
            inject(model, LoRAConfig(target_modules=("c_attn",)))
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


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, AveragedModel, torch.compile, nn.parallel.DistributedDataParallel],
)
def test_a_wrapped_model_is_saved_and_unwrapped_as_the_inner_one_and_not_adapted(
    base, tmp_path, wrap
):
    with pytest.raises(ValueError, match=r"is wrapped in .*; adapt the inner model, then wrap it"):
        inject(wrap(load_gpt2(base)), LoRAConfig(target_modules="all-linear"))
    model = adapted(base, ("c_attn",))
    save_adapter(model, tmp_path / "inner")
    wrapped = nn.DataParallel(wrap(model))
    save_adapter(wrapped, tmp_path / "wrapped")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "inner")
    with pytest.raises(ValueError, match="is wrapped in"):
        load_adapter(wrap(load_gpt2(base)), tmp_path / "inner")

    unwrap(wrapped)
    assert not lora_layers(wrapped)
    assert not any(hasattr(module, "lora_config") for module in wrapped.modules())
    with pytest.raises(ValueError, match="the model has no adapter to save"):
        save_adapter(wrapped, tmp_path / "wrapped")


def test_an_adapter_of_a_part_is_not_saved_as_the_wholes(base, tmp_path):
    whole = nn.ModuleDict({"backbone": adapted(base, ("c_attn",)), "head": nn.Linear(32, 2)})
    with pytest.raises(ValueError, match="belongs to a part of the model: backbone; save it"):
        save_adapter(whole, tmp_path)
    whole = inject(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    with pytest.raises(ValueError, match="belongs to a larger model, of which this is a part"):
        save_adapter(whole[0], tmp_path)
    whole.append(inject(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, lora_alpha=50)))
    with pytest.raises(ValueError, match="belongs to a part of the model: 1; save it"):
        save_adapter(whole, tmp_path)
    assert not any(tmp_path.iterdir())


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


def test_a_config_does_not_change_with_the_dict_that_it_was_given():
    pattern = {"c_fc": 2}
    config = LoRAConfig(rank_pattern=pattern, alpha_pattern=pattern)
    pattern["c_fc"] = 4
    assert config.rank_pattern == config.alpha_pattern == {"c_fc": 2}


def test_a_config_is_given_as_to_peft():
    """Lists, and single values where PEFT takes them, are the tuples of the config."""
    given = LoRAConfig(target_modules=["c_fc"], layers_to_transform=0, layers_pattern="h")
    assert given == LoRAConfig(
        target_modules=("c_fc",), layers_to_transform=(0,), layers_pattern=("h",)
    )
    some = LoRAConfig(target_modules=["c_fc"], layers_to_transform=range(2))
    assert some.layers_to_transform == (0, 1)
    assert LoRAConfig(layers_to_transform=[], layers_pattern="") == LoRAConfig()
