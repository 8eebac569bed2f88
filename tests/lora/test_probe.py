"""`probe` finds adapters that a model does not use, and finds nothing in correct models."""

import pytest
import torch
import transformers
from torch import nn

from lora import LoRAConfig, inject, probe, quantise
from storage.weights import load_gpt2
from tests.models import CASES, EXPERTS, GROUPED, IDS, make, named
from tests.pairs import IDS as GPT2_IDS


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    return transformers.MambaForCausalLM(config)


class Wrong(nn.Module):
    """`read` is called and its weight is read, `twice` is tied, and `idle` is not used."""

    def __init__(self):
        super().__init__()
        for name in ("right", "read", "idle", "head"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x):
        x = torch.tanh(self.right(x)) + self.read(x) @ self.read.weight.T
        return {"logits": self.head(x), "ids": torch.arange(3)}


FOUND = {
    "idle": "B has no gradient with these inputs",
    "read": "merging changes the output with these inputs",
}


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_layer_that_is_not_used_and_a_weight_that_is_read_are_found(fields):
    torch.manual_seed(0)
    model = inject(Wrong(), LoRAConfig(r=2, **fields))
    assert probe(model, torch.randn(4, 8)) == FOUND


def test_a_layer_of_mamba_that_is_read_and_not_called_is_found():
    model = inject(mamba(), LoRAConfig(r=2))
    assert list(probe(model, IDS)) == ["backbone.layers.0.mixer.dt_proj"]


def test_a_head_that_is_tied_after_inject_is_found():
    model = inject(make(CASES["llama"]), LoRAConfig(r=2, target_modules=["lm_head"]))
    model.model.embed_tokens.weight = model.lm_head.base_layer.weight
    assert "merging" in probe(model, input_ids=IDS)["lm_head"]


MIXTURE = named("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=24, **GROUPED, **EXPERTS)
RIGHT = {name: CASES[name] for name in ("llama", "t5", "vit", "plain")} | {"mixture": MIXTURE}


@pytest.mark.filterwarnings("ignore")  # about experts
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
def test_nothing_is_found_in_models_that_are_adapted_correctly(name, fields):
    model = inject(make(RIGHT[name]), LoRAConfig(r=1, **fields))
    assert probe(model, **RIGHT[name].inputs) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", None])
def test_nothing_is_found_in_gpt2_with_slices(base, dtype, kind):
    model = load_gpt2(base).to(dtype)
    if kind:
        quantise(model, kind)
    inject(model, LoRAConfig(target_modules=("c_attn.q", "c_attn.v", "c_proj")))
    assert probe(torch.compile(model), GPT2_IDS) == {}


def test_the_model_is_left_as_it_was():
    model = inject(make(CASES["llama"]), LoRAConfig(r=2, lora_dropout=0.5)).train()
    model.lm_head.eval()
    model(input_ids=IDS).logits.sum().backward()
    before = [x.clone() for p in model.parameters() for x in (p, p.grad) if x is not None]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    probe(model, input_ids=IDS)
    after = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
    assert all(map(torch.equal, before, after)) and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match="the model has no adapter"):
        probe(make(CASES["llama"]), input_ids=IDS)
