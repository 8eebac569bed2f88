"""The fixtures for engines agree with stock transformers and PEFT, and with this project."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from generators.fixtures import load
from lora import load_adapter, lora_layers
from lora_conformance import fixtures
from lora_conformance.updates import Model, updates
from storage.weights import load_gpt2

INDEX = fixtures.index()
FIXTURES = INDEX["fixtures"]
PROMPTS = [prompt["tokens"] for prompt in INDEX["prompts"]]
LOGITS = fixtures.logits()
OURS_REFUSES = {
    "llama-embedding": "embedding",
    "qwen3-tied-head": "tied",
    "qwen3-moe-experts": "target_parameters",
}
# A mistake of a server, as a change of the config, and the fixtures that must find it.
MISTAKES = [
    ("gpt2-attention", {"lora_alpha": 4}),
    ("gpt2-all-linear", {"lora_alpha": 2}),
    ("gpt2-rslora-patterns", {"use_rslora": False}),
    ("gpt2-rslora-patterns", {"alpha_pattern": {}}),
    ("llama-attention", {"lora_alpha": 8}),
    ("llama-mlp-rslora", {"use_rslora": False}),
    ("llama-patterns", {"alpha_pattern": {}}),
    ("qwen3-dora", {"use_dora": False}),
    ("qwen3-moe-experts", {"lora_alpha": 3}),
]


def base_of(name: str) -> Path:
    return fixtures.HERE / FIXTURES[name]["base"]


def adapter_of(name: str) -> Path:
    return fixtures.HERE / FIXTURES[name]["adapter"]


def copy_of(name: str, tmp_path: Path, **config: object) -> Path:
    """Copy a fixture's adapter, with other values in its config."""
    copy = Path(shutil.copytree(adapter_of(name), tmp_path / name))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


@torch.no_grad()
def failures(model: nn.Module, name: str, expected: str = "tokens") -> set[str]:
    """Return what of a model's results differs from the fixture. One pass over the prompt and the
    expected tokens finds out whether the model would choose each of these tokens."""
    wrong = set()
    for i, prompt in enumerate(PROMPTS):
        tokens = FIXTURES[name][expected][i]
        ids = torch.tensor([prompt + tokens[:-1]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        right = LOGITS[name][i]
        if np.abs(logits[0].numpy() - right).max() > 1e-5 * np.abs(right).max():
            wrong.add("logits")
        if logits.argmax(-1).tolist() != tokens:
            wrong.add("tokens")
    return wrong


class WithLogits(nn.Module):
    """Our GPT-2 under the interface of transformers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        return transformers.modeling_outputs.CausalLMOutput(logits=self.model(input_ids))


@pytest.mark.parametrize("name", FIXTURES)
def test_stock_peft_gives_the_logits_and_tokens(name):
    assert failures(load(base_of(name), adapter_of(name)), name) == set()


@pytest.mark.parametrize("name", FIXTURES)
def test_a_copy_with_b_zero_fails_and_gives_the_tokens_of_the_base(name, tmp_path):
    copy = copy_of(name, tmp_path)
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, tensor in tensors.items():
        if "lora_B" in key or "embedding_B" in key:
            assert tensor.count_nonzero() == tensor.numel()
            tensor.zero_()
    save_file(tensors, path, {"format": "pt"})
    model = load(base_of(name), copy)
    assert failures(model, name) == {"logits", "tokens"}
    if "dora" not in name:  # m still changes the base
        assert "tokens" not in failures(model, name, "tokens_without_adapter")


@pytest.mark.parametrize("name", FIXTURES)
def test_every_prompt_has_other_tokens_without_the_adapter(name):
    fixture = FIXTURES[name]
    without = fixture["tokens_without_adapter"]
    assert "tokens" not in failures(load(base_of(name)), name, "tokens_without_adapter")
    assert all(a != b for a, b in zip(without, fixture["tokens"], strict=True))


@pytest.mark.parametrize(("name", "config"), MISTAKES)
def test_a_server_that_misreads_the_config_gives_other_tokens(name, config, tmp_path):
    assert failures(load(base_of(name), copy_of(name, tmp_path, **config)), name) == {
        "logits",
        "tokens",
    }


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_merged_in_numpy_give_the_same_without_peft(name):
    base = base_of(name)
    model = load(base)
    if "lm_head" in name or name == "qwen3-tied-head":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # untied
    with torch.no_grad():
        for parameter, weight, merge in updates(Model(base), adapter_of(name)):
            model.get_parameter(parameter).copy_(torch.from_numpy(merge(weight)))
    assert failures(model, name) == set()


@pytest.mark.parametrize("name", FIXTURES)
def test_this_project_gives_the_same_or_refuses(name):
    base = base_of(name)
    model = load_gpt2(base) if name.startswith("gpt2") else load(base)
    if name in OURS_REFUSES:
        with pytest.raises(ValueError, match=OURS_REFUSES[name]):
            load_adapter(model, adapter_of(name))
        return
    load_adapter(model, adapter_of(name))
    assert lora_layers(model)
    model.eval()
    assert failures(WithLogits(model) if name.startswith("gpt2") else model, name) == set()


def test_the_tokenizer_gives_the_tokens_of_each_prompt():
    for base in {base_of(name) for name in FIXTURES}:
        stored = transformers.AutoTokenizer.from_pretrained(base)
        for prompt in INDEX["prompts"]:
            assert stored(prompt["text"]).input_ids == prompt["tokens"]
            assert stored.decode(prompt["tokens"]) == prompt["text"]


def test_the_files_are_small_and_each_kind_is_present():
    files = [path for path in fixtures.HERE.rglob("*") if path.suffix in (".safetensors", ".json")]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.name for path in (fixtures.HERE / "adapters").iterdir()} == FIXTURES.keys()
