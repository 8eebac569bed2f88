"""`python -m adapters.gguf`: read by the `gguf` package, against stock PEFT and transformers."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from adapters.gguf import main
from adapters.load import load_with_adapter
from lora.save import save_adapter
from tests.helpers import TINY, relative_difference, tiny_gpt2_directory, token_ids
from tests.pairs import ALL_FOUR, adapted, randomize
from tests.runs import one_line, run, stdout_of, stock_model, story

PATTERNS = {"rank_pattern": {"h.0.attn.c_attn": 6}, "alpha_pattern": {"c_fc": 5}}
LAYERS = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, TINY["n_layer"])


def theirs_name(name: str) -> str:
    """Return llama.cpp's name for a parameter of transformers, by the `gguf` package's map."""
    return LAYERS.get_name(name, try_suffixes=(".weight", ".bias"))


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return a file's metadata, and its tensors as (out, in)."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def expected_changes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return PEFT's update of each layer of its model, (out, in), by llama.cpp's name."""
    changes = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            changes[theirs_name(f"{name}.weight")] = layer.get_delta_weight("default").T
    return changes


def assert_changes(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Read the file as llama.cpp does: alpha / rank * B A for each layer."""
    fields, tensors = read(path)
    assert fields["general.architecture"] == "gpt2"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    parts = {f"{name}.lora_{part}" for name in expected for part in "ab"}
    assert tensors.keys() == parts and expected
    for name, change in expected.items():
        a = tensors[f"{name}.lora_a"]
        b = tensors[f"{name}.lora_b"]
        found = fields["adapter.lora.alpha"] / len(a) * b @ a
        assert found.shape == change.shape and change.abs().max() > 0.01
        assert relative_difference(found, change) < 1e-6, name


def test_an_adapter_of_ours_holds_the_update_that_peft_computes(base, tmp_path):
    save_adapter(adapted(base, ALL_FOUR, r=3, **PATTERNS), tmp_path / "lora", "gpt2")
    out = tmp_path / "lora.gguf"
    said = stdout_of(main, tmp_path / "lora", "--base", base, "--out", out)
    assert said == f"{tmp_path / 'lora'}, an adapter of {base}, -> {out}\n"
    assert_changes(out, expected_changes(stock_model(base, tmp_path / "lora")))


def test_an_adapter_of_peft_with_expressions_and_rslora_is_written_alike(base, tmp_path):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=r"transformer\.h\.\d\.(attn\.c_attn|mlp\.c_proj)",
        rank_pattern={r"h\.1\..*": 2},
        alpha_pattern={"transformer.h.0.mlp.c_proj": 2.5},
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(stock_model(base), config)
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    stdout_of(main, tmp_path / "lora", "--base", base, "--out", tmp_path / "lora.gguf")
    assert_changes(tmp_path / "lora.gguf", expected_changes(model))


def assert_weights(path: Path, model: nn.Module) -> dict:
    """Compare the file's tensors with transformers' model. Return its metadata."""
    fields, tensors = read(path)
    expected = {theirs_name(name): value for name, value in model.state_dict().items()}
    del expected["output.weight"]  # tied to the embedding
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        if value.ndim == 2 and name.startswith("blk."):
            value = value.T
        assert tensors[name].shape == value.shape
        assert relative_difference(tensors[name], value) < 1e-6, name
    return fields


def merges_of(tokenizer: transformers.PreTrainedTokenizerFast) -> list[str]:
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    return [" ".join(pair) for pair in stored["model"]["merges"]]


def test_a_whole_model_is_that_of_transformers_with_its_tokenizer(tmp_path):
    base, model = tiny_gpt2_directory(tmp_path / "base", n_inner=48)
    model.resize_token_embeddings(TINY["vocab_size"] + 3, mean_resizing=False)
    model.save_pretrained(base)
    out = tmp_path / "model.gguf"
    assert stdout_of(main, "--base", base, "--out", out) == f"{base} -> {out}\n"

    fields = assert_weights(out, model)
    assert fields["general.name"] == "model"  # instead of a local path
    assert fields["gpt2.feed_forward_length"] == 48
    assert fields["gpt2.attention.head_count"] == TINY["n_head"]
    assert fields["gpt2.context_length"] == TINY["n_positions"]
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.tokens"] == [*words, "[PAD317]", "[PAD318]", "[PAD319]"]
    assert fields["tokenizer.ggml.token_type"] == [1] * 316 + [3] + [5] * 3
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    merges = merges_of(tokenizer)
    assert fields["tokenizer.ggml.merges"] == merges

    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    stdout_of(main, "--base", base, "--out", tmp_path / "two-files.gguf")
    again, _ = read(tmp_path / "two-files.gguf")
    assert {**again, "general.name": "model"} == fields


def test_other_special_tokens_are_written_as_control_tokens(tmp_path):
    base, _ = tiny_gpt2_directory(tmp_path / "base")
    stored = json.loads((base / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    del vocabulary[next(word for word, i in vocabulary.items() if i == 315)]
    vocabulary["<user>"] = 315
    stored["model"]["merges"].pop()  # which gave token 315
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": 315, "content": "<user>"})
    (base / "tokenizer.json").write_text(json.dumps(stored))
    stdout_of(main, "--base", base, "--out", tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.tokens"][315] == "<user>"
    assert fields["tokenizer.ggml.token_type"] == [1] * 315 + [3] * 2


@torch.no_grad()
def test_transformers_reads_our_logits_and_tokens_from_the_file(tmp_path):
    base, _ = tiny_gpt2_directory(tmp_path / "base", n_positions=1024)  # transformers requires it
    save_adapter(adapted(base, ALL_FOUR, r=3), tmp_path / "lora", "gpt2")
    ours = load_with_adapter(str(base), tmp_path / "lora")
    stdout_of(main, tmp_path / "lora", "--base", base, "--merge", "--out", tmp_path / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = token_ids(TINY["vocab_size"], 2, 64)
    assert relative_difference(model(ids).logits, ours.model(ids)) < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = f"{story(3)}<|endoftext|> <|endoftext|>\n"
    assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text).tolist()


def test_dora_is_refused_as_an_adapter_and_written_merged(base, tmp_path):
    save_adapter(adapted(base, ALL_FOUR, r=3, use_dora=True), tmp_path / "dora", "gpt2")
    out = tmp_path / "out.gguf"
    (tmp_path / "dora" / "chat_template.jinja").write_text("{{ messages }}")
    argv = (tmp_path / "dora", "--base", base, "--out", out)
    assert one_line(run(main, *argv), 2).endswith("merge it instead") and not out.exists()

    assert stdout_of(main, *argv, "--merge") == f"{base} + {tmp_path / 'dora'} -> {out}\n"
    merged = stock_model(base, tmp_path / "dora").merge_and_unload()
    assert assert_weights(out, merged)["tokenizer.chat_template"] == "{{ messages }}"
    plain = stock_model(base).state_dict()["transformer.h.0.attn.c_attn.weight"]
    _, tensors = read(out)
    assert relative_difference(tensors["blk.0.attn_qkv.weight"].T, plain) > 0.01


def test_a_lower_precision_is_that_of_the_matrices(base, tmp_path):
    stdout_of(main, "--base", base, "--precision", "bf16", "--out", tmp_path / "low.gguf")
    state = {theirs_name(name): x for name, x in stock_model(base).state_dict().items()}
    for tensor in gguf.GGUFReader(tmp_path / "low.gguf").tensors:
        is_matrix = len(tensor.shape) == 2
        assert tensor.tensor_type.name == ("BF16" if is_matrix else "F32")
        if is_matrix:
            stored = torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
            expected = state[tensor.name].bfloat16()
            if tensor.name.startswith("blk."):
                expected = expected.T
            assert torch.equal(stored, expected), tensor.name


def test_other_merges_with_gpt2s_pattern_are_written_and_other_kinds_refused(tmp_path):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        [story()], trainers.BpeTrainer(vocab_size=TINY["vocab_size"] - 1, initial_alphabet=letters)
    )
    made.add_special_tokens(["<|endoftext|>"])
    base, _ = tiny_gpt2_directory(tmp_path / "base")
    made.save(str(base / "tokenizer.json"))
    stdout_of(main, "--base", base, "--out", tmp_path / "own.gguf")
    fields, _ = read(tmp_path / "own.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.tokens"][: len(words)] == words
    assert fields["tokenizer.ggml.merges"] == merges_of(tokenizer)

    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(base / "tokenizer.json"))
    line = one_line(run(main, "--base", base, "--out", tmp_path / "no.gguf"), 2)
    assert line.startswith(f"error: {base}: the tokenizer is not a byte-level BPE")
    assert not (tmp_path / "no.gguf").exists()


def test_what_llama_cpp_would_leave_out_is_refused(adapter, tmp_path):
    base, _ = tiny_gpt2_directory(tmp_path / "base", activation_function="gelu")
    for argv in ((), (adapter,), (adapter, "--merge")):
        line = one_line(run(main, *argv, "--base", base, "--out", tmp_path / "out.gguf"), 2)
        assert "has activation_function gelu, but llama.cpp" in line
        assert not (tmp_path / "out.gguf").exists()


def test_wrong_arguments_are_refused(base, adapter, tmp_path):
    out = tmp_path / "out.gguf"
    assert "--merge: needs an ADAPTER" in one_line(run(main, "--merge", "--out", out), 2)
    assert "--quantise" in one_line(run(main, adapter, "--quantise", "nf4", "--out", out), 2)
    save_adapter(adapted(base, ("c_attn",), r=3), tmp_path / "other", "gpt2", "b" * 64)
    argv = (tmp_path / "other", "--base", base, "--out", out)
    assert "was trained on another base" in one_line(run(main, *argv), 2)
    out.write_text("mine")
    line = one_line(run(main, adapter, "--base", base, "--out", out), 2)
    assert line == f"error: --out {out}: exists already; name a new file"
    assert out.read_text() == "mine"


def test_a_missing_package_is_named_in_one_line(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for argv in ((), (adapter,)):
        line = one_line(run(main, *argv, "--base", base, "--out", tmp_path / "out.gguf"), 2)
        assert line == "error: gguf is not installed; pip install -e '.[gguf]'"
