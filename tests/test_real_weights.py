"""The pages of real weights and QLoRA: their code runs, and their tables are right."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from adapters import gguf
from lora import (
    LoRAConfig,
    dequantise,
    inject,
    load_adapter,
    lora_layers,
    merge,
    quantise,
    save_adapter,
)
from lora.peft_config import CONFIG
from lora.quantised import quantised_layers
from tests import models
from tests.helpers import relative_difference, tiny_gpt2_directory, write_small_tokenizer
from tests.models import (
    EXPERTS,
    GROUPED,
    IDS,
    SMALL,
    TOKENS,
    Case,
    make,
    named,
    output,
    small_llama,
)
from tests.pairs import randomize
from tests.runs import stdout_of, story
from training.options import ROOT

QLORA = (ROOT / "docs" / "qlora.md").read_text()
PAGE = (ROOT / "docs" / "real-weights.md").read_text()
SOUND = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))


def snippet(text: str) -> str:
    """Return the one Python block that loads a model, trains it and merges the adapter."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "merge(" in b]
    return block


def test_the_code_on_the_page(tmp_path, monkeypatch):
    base = small_llama().eval()
    base.save_pretrained(tmp_path / "base")
    write_small_tokenizer(tmp_path / "base", 317)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "book.txt").write_text(story(400))
    monkeypatch.chdir(tmp_path)
    code = snippet(PAGE)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code and "= 40, 8, 128, 2e-3" in code
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base")
    names: dict = {}
    exec(code.replace("= 40, 8, 128, 2e-3", "= 20, 4, 32, 2e-2"), names)

    with torch.no_grad():
        before = base(IDS).logits
        expected = names["in_peft"](IDS).logits
        merged = names["model"](IDS).logits
        stored = transformers.AutoModelForCausalLM.from_pretrained("merged")(IDS).logits
    assert relative_difference(before, expected) > 0.05
    assert relative_difference(merged, expected) < 1e-5
    assert torch.equal(stored, merged)
    load_adapter(base, "adapter")
    assert relative_difference(base(IDS).logits, expected) < 1e-6


def test_a_model_from_a_gguf_file_is_saved_with_two_lines_of_the_page(tmp_path):
    base, _ = tiny_gpt2_directory(tmp_path / "base", n_positions=1024)  # transformers requires it
    stdout_of(gguf.main, "--base", base, "--out", tmp_path / "model.gguf")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"(?i)quantized with (QuantizationMethod\.)?gguf and is not serializable"
    ):
        model.save_pretrained(tmp_path / "merged")
    [lines] = re.findall(r"```python\n(model\.hf_quantizer.*?)```", PAGE, re.DOTALL)
    exec(lines, {"model": model})
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged")(IDS).logits, model(IDS).logits)


def test_the_trainer_of_transformers_trains_only_a_and_b(tmp_path):
    model = inject(small_llama(), LoRAConfig(target_modules="all-linear"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}

    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path).eval()
    assert relative_difference(loaded(IDS).logits, model.eval()(IDS).logits) < 1e-6


def test_the_program_with_four_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_llama().save_pretrained("base")
    write_small_tokenizer(tmp_path / "base", 317)
    (tmp_path / "data").mkdir()
    Path("data/book.txt").write_text(story(400))
    [code] = re.findall(r"```python\n(.*?)```", QLORA, re.DOTALL)
    names: dict = {}
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base"), names)

    model = names["model"].eval()
    linear = {name for name, _ in small_llama().named_modules() if name.endswith("_proj")}
    assert {name.removesuffix(".base_layer") for name in quantised_layers(model)} == linear
    assert type(model.lm_head) is nn.Linear
    dequantise(model.float())
    base = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16)
    quantise(base, "nf4")
    dequantise(base.float())
    before = base(IDS).logits
    loaded = peft.PeftModel.from_pretrained(base, "adapter").eval()
    logits = model(IDS).logits
    assert relative_difference(loaded(IDS).logits, logits) < 1e-5
    assert relative_difference(before, logits) > 0.01
    merge(model)
    assert relative_difference(model(IDS).logits, logits) < 1e-5

    base = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    quantise(base, "nf4")
    dequantise(base)
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, "adapter").eval()
    assert relative_difference(merged(IDS).logits, loaded(IDS).logits) < 1e-5


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, num_labels=5)
    return transformers.BertForSequenceClassification(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=97,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=10,
        decoder_start_token_id=1,
        **TOKENS,
    )
    return transformers.WhisperForConditionalGeneration(config)


CASES = {
    "Llama": named("Llama", **GROUPED),
    "Qwen2": named("Qwen2", **GROUPED),
    "Gemma": named("Gemma", **GROUPED, head_dim=8),
    "Mixtral": named("Mixtral", **GROUPED, num_local_experts=4),
    "Qwen2-MoE": named(
        "Qwen2Moe", **GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24
    ),
    "GPT-NeoX": named("GPTNeoX", **TOKENS),
    "Falcon": named("Falcon", ffn_hidden_size=48),
    "Phi": named("Phi", **TOKENS),
    "BERT": Case(bert, {"input_ids": IDS}, [], None),
    "T5": models.CASES["t5"],
    "ViT": models.CASES["vit"],
    "Whisper": Case(whisper, {"input_features": SOUND, "decoder_input_ids": IDS}, [], None),
}


def table(heading: str) -> list[list[str]]:
    """Return the cells of the page's table below a heading, row by row."""
    below = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    _, *rows = re.findall(r"^\| (.*) \|$", below, re.MULTILINE)
    return [row.split(" | ") for row in rows]


LAYERS = {
    name: set(re.findall(r"`(\w+)`", layers))
    for names, layers, _ in table("Which layers")
    for name in names.split(", ")
}


@pytest.mark.filterwarnings("ignore")  # from mixtures of experts
@pytest.mark.parametrize("name", CASES)
def test_all_linear_adapts_what_peft_adapts(name, tmp_path):
    case = CASES[name]
    # Rank 8 is more than the outputs of `shared_expert_gate` (1) and `classifier` (5).
    fields = {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
    ours = make(case)
    inject(ours, LoRAConfig(**fields))
    stock = peft.get_peft_model(make(case), peft.LoraConfig(**fields))
    theirs = stock.base_model
    layers = list(lora_layers(ours))
    assert layers == theirs.targeted_module_names
    if transformers.__version__ >= "5":  # version 4 has other names in ViT, and a layer per expert
        assert {layer.rpartition(".")[2] for layer in layers} == LAYERS[name]
        experts = {target.rpartition(".mlp.")[2] for target in theirs.targeted_parameter_names}
        mixtral = {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
        assert experts == (mixtral if name == "Mixtral" else set())

    randomize(ours)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == case.task_type
    loaded = peft.PeftModel.from_pretrained(make(case), tmp_path).eval()
    assert relative_difference(output(loaded, case), output(ours, case)) < 1e-5
    assert relative_difference(output(make(case), case), output(ours, case)) > 0.05
    if name != "Mixtral":  # where PEFT's adapter contains updates of experts
        randomize(stock)
        stock.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        again = make(case)
        load_adapter(again, tmp_path / "theirs")
        assert relative_difference(output(again, case), output(stock.eval(), case)) < 1e-5
