"""The functions that users of PEFT look for, compared with PEFT's."""

from dataclasses import asdict

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lora import (
    LoRAConfig,
    adapter_state_dict,
    inject,
    lora_layers,
    save_adapter,
)
from lora.save import WEIGHTS
from tests.models import Plain
from tests.pairs import randomize


@pytest.fixture
def sides():
    """Return a model with our adapter, and with an adapter of PEFT."""
    torch.manual_seed(0)
    ours = inject(Plain(), LoRAConfig(r=4, use_dora=True))
    theirs = peft.get_peft_model(
        Plain(), peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    )
    return ours, theirs


def test_inject_returns_the_model_and_its_layers_have_the_shape_of_linear_layers():
    model = Plain()
    assert inject(model, LoRAConfig(r=2)) is model
    shapes = [(layer.in_features, layer.out_features) for layer in lora_layers(model).values()]
    assert shapes == [(12, 32), (32, 48), (48, 32), (32, 48), (48, 32), (32, 5)]


def test_defaults_are_pefts_except_alpha():
    theirs = peft.LoraConfig(target_modules="all-linear", lora_alpha=16).to_dict()
    ours = asdict(LoRAConfig())
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.usefixtures("process_group")
def test_the_state_dict_is_the_files_and_shares_memory_with_the_model(sides, tmp_path):
    ours, theirs = sides
    randomize(ours)
    tensors = adapter_state_dict(nn.parallel.DistributedDataParallel(ours))
    assert tensors.keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert not any(tensor.requires_grad for tensor in tensors.values())
    save_adapter(ours, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(tensors[key], saved[key]) for key in saved)
    tensors["base_model.model.head.lora_B.weight"].zero_()
    assert not ours.head.lora_B.weight.any()


@pytest.mark.usefixtures("process_group")
def test_a_model_of_fsdp_is_saved_after_unshard(sides, tmp_path):
    ours, _ = sides
    randomize(ours)
    save_adapter(ours, tmp_path / "before")
    fully_shard(ours, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"enter\.lora_A\.weight is sharded.* `unshard`"):
        save_adapter(ours, tmp_path / "sharded")
    for module in ours.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    save_adapter(ours, tmp_path / "after")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) for key in before)
