"""Refuse, with the true reason, what would silently go wrong in models of other projects."""

import os
import stat
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora import (
    LoRAConfig,
    inject,
    load_adapter,
    lora_layers,
    merge,
    quantise,
    save_adapter,
    trained_parameters,
    unmerge,
)
from lora.peft_config import CONFIG
from lora.save import WEIGHTS
from tests.helpers import relative_difference
from tests.pairs import randomize

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


class Shared(nn.Module):
    """A block that is used three times, as in ALBERT, and a head."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.blocks = nn.ModuleList([block] * 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # under the block's other names
@pytest.mark.parametrize("targets", ["all-linear", ("blocks.0.0",)])
def test_a_block_that_is_used_three_times_is_adapted_once_as_in_peft(targets, tmp_path):
    torch.manual_seed(0)
    base = Shared()
    model = inject(deepcopy(base), LoRAConfig(r=2, target_modules=targets))
    names = ["blocks.0.0", "head"] if targets == "all-linear" else ["blocks.0.0"]
    assert list(lora_layers(model)) == names
    randomize(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours")
    assert relative_difference(theirs(X), model(X)) < 1e-6
    assert relative_difference(base(X), model(X)) > 0.01
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = deepcopy(base)
    load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(loaded(X), model(X))
    expected = model(X)
    merge(model)
    assert relative_difference(model(X), expected) < 1e-5


def test_a_layer_at_two_places_is_tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model.append(model[0])
    with pytest.raises(ValueError, match="0 is tied to 2, and an update of one"):
        inject(model, LoRAConfig(target_modules=("0",)))


def test_a_linear_layer_alone_is_refused_for_the_true_reason():
    with pytest.raises(ValueError, match=r"the model is itself a linear layer.*wrap it in LoRALin"):
        inject(nn.Linear(8, 8), LoRAConfig())


def test_a_complex_weight_is_refused():
    for fields in ({}, {"init_lora_weights": "pissa"}, {"use_dora": True}):
        model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64))
        with pytest.raises(ValueError, match="0: the weight is complex"):
            inject(model, LoRAConfig(r=1, **fields))
    with pytest.raises(ValueError, match="0: the weight is complex"):
        quantise(model, "int8")


def test_quantise_refuses_a_layer_whose_hook_would_be_lost():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0: Linear has a hook, which would be lost"):
        quantise(model, "nf4")
    assert type(model[0]) is nn.Linear


def test_nf4_without_its_levels_is_refused():
    model = nn.Sequential(nn.Linear(64, 64, device="meta"))
    quantise(model, "nf4")
    real = nn.Sequential(nn.Linear(64, 64))
    quantise(real, "nf4")
    model.load_state_dict(real.state_dict(), assign=True)
    with pytest.raises(ValueError, match="quantised on the meta device; load it first"):
        model(torch.randn(2, 64))


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_the_input_may_be_given_by_name(fields):
    model = inject(nn.Sequential(nn.Linear(16, 16)).eval(), LoRAConfig(**fields))
    assert torch.equal(model[0](input=X), model[0](X))
    linear = nn.Sequential(nn.Linear(16, 16))
    quantise(linear, "nf4")
    assert torch.equal(linear[0](input=X), linear[0](X))


def test_the_weight_of_a_lora_layer_tells_its_type_and_refuses_computations():
    model = inject(nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16), LoRAConfig())
    weight = model[0].weight
    assert (weight.dtype, weight.device.type) == (torch.bfloat16, "cpu")
    assert model[0].bias is model[0].base_layer.bias  # which Mamba reads
    for compute in (lambda: weight.norm(), lambda: X @ weight.T, lambda: weight.data.float()):
        with pytest.raises(ValueError, match="computes with `weight` of a LoRA layer"):
            compute()


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_an_adapter_that_has_changed_since_the_merge_is_not_unmerged(fields):
    model = inject(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), LoRAConfig(r=2, **fields))
    randomize(model)
    expected = model.eval()(X)
    merge(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    copy = deepcopy(model)
    unmerge(copy)
    assert relative_difference(copy(X), expected) < 1e-5
    b = trained_parameters(model)["1.lora_B.weight"]
    b.data = b.data.roll(1)  # the sum and the version of the tensor stay
    average.update_parameters(model)
    for changed in (model, average):
        with pytest.raises(ValueError, match=r"A or B has changed since the merge"):
            unmerge(changed)
        assert lora_layers(changed).popitem()[1].merged


class Nested(nn.Module):
    """`layers` names a list of blocks and a list inside of each block."""

    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList()
        for _ in range(3):
            block = nn.Module()
            block.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
            self.body.layers.append(block)
        self.config = {}


def test_the_first_list_of_a_repeated_name_numbers_the_blocks_as_in_peft():
    fields = {"target_modules": ["0", "1"], "layers_to_transform": 2, "layers_pattern": "layers"}
    model = inject(Nested(), LoRAConfig(**fields))
    theirs = peft.get_peft_model(Nested(), peft.LoraConfig(**fields))
    assert list(lora_layers(model)) == theirs.base_model.targeted_module_names
    assert list(lora_layers(model)) == ["body.layers.2.layers.0", "body.layers.2.layers.1"]


def test_a_file_with_an_unused_pattern_loads_as_in_peft(tmp_path):
    base = nn.Sequential(nn.Linear(16, 16))
    patterns = {"rank_pattern": {"gone": 2}, "alpha_pattern": {"gone": 4}}
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **patterns)
    theirs = peft.get_peft_model(deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    assert relative_difference(base(X), theirs(X)) < 1e-6
    with pytest.raises(ValueError, match="pattern 'gone' matches no adapted layer"):
        inject(nn.Sequential(nn.Linear(16, 16)), LoRAConfig(**patterns))


def test_an_adapter_reaches_the_disk_before_and_after_its_names(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else path.suffix)
        whole = {name for name in (WEIGHTS, CONFIG) if (tmp_path / name).exists()}
        assert path.suffix != ".tmp" or path.name.split(".")[1] not in whole

    monkeypatch.setattr(os, "fsync", fsync)
    save_adapter(inject(nn.Sequential(nn.Linear(16, 16)), LoRAConfig()), tmp_path)
    assert synced == [".tmp", "directory"] * 2
