"""`merged` on kinds of models, precisions and adapters: right merges by PEFT, and wrong ones."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_conformance.merged import main

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,  # so the experts' matrices are square
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LLAMA = SMALL | {"model_type": "llama"}
TIED = LLAMA | {"tie_word_embeddings": True}
MOE = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
EXPERTS = {
    "target_modules": [],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
RIGHT = {
    "gpt2": (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama": (LLAMA, LINEAR),
    "qwen3, tied": (TIED | {"model_type": "qwen3"}, LINEAR),
    "gemma3, tied, DoRA": (SMALL | {"model_type": "gemma3_text"}, LINEAR | {"use_dora": True}),
    "phi3, rsLoRA": (
        SMALL | {"model_type": "phi3"},
        {"target_modules": ["qkv_proj", "gate_up_proj"], "use_rslora": True},
    ),
    "mixtral": (MOE | {"model_type": "mixtral"}, EXPERTS),
    "gpt-oss": (MOE | {"model_type": "gpt_oss"}, EXPERTS),
    "qwen3-moe": (MOE | {"model_type": "qwen3_moe", "moe_intermediate_size": 32}, EXPERTS),
    "modules_to_save": (LLAMA, LINEAR | {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_to_save, tied": (TIED, LINEAR | {"modules_to_save": ["lm_head"]}),
    "tokens": (LLAMA, LINEAR | {"trainable_token_indices": [3, 5]}),
    "tokens, tied": (TIED, LINEAR | {"trainable_token_indices": [3, 5]}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"]}),
}
TIES = {
    "embedding": (TIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (TIED, {"target_modules": ["lm_head", "q_proj"]}),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def folders(out: Path, case: Any, precision: str = "fp32", std: float = 0.05) -> list[Path]:
    """Write a base, a random adapter and the merge by PEFT, and return the folders."""
    fields, settings = case
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).to(PRECISIONS[precision])
    model.save_pretrained(out / "base")
    lora = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "embedding" in name:
                parameter.normal_(std=std)
            elif "magnitude" in name:
                parameter *= 1 + 0.1 * torch.rand_like(parameter)
            elif "modules_to_save" in name or "trainable_tokens" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(out / "adapter")
    adapted.merge_and_unload().save_pretrained(out / "merged")
    return [out / name for name in ("base", "adapter", "merged")]


def change(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def status(*arguments: object) -> int:
    return main([*map(str, arguments), "--others-unchanged"])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_merge_by_peft_is_right(name, precision, tmp_path, capsys):
    base, adapter, merged = folders(tmp_path, RIGHT[name], precision)
    assert status(base, adapter, merged) == 0, capsys.readouterr()
    assert status(base, adapter, base) == 1
    assert " lost " in capsys.readouterr().out


@pytest.mark.parametrize("name", TIES)
def test_an_update_of_one_tied_weight_must_not_move_the_other(name, tmp_path, capsys):
    """PEFT merges it into both, so the merged model differs from the adapted model."""
    base, adapter, merged = folders(tmp_path, TIES[name])
    assert status(base, adapter, merged) == 1
    assert "changed, without an update" in capsys.readouterr().out
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    other = "lm_head.weight" if name == "embedding" else "model.embed_tokens.weight"

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[other] = weight

    change(merged, untie)
    config = json.loads((merged / "config.json").read_text()) | {"tie_word_embeddings": False}
    (merged / "config.json").write_text(json.dumps(config))
    assert status(base, adapter, merged) == 0


def test_a_square_expert_is_read_by_the_kind_of_model(tmp_path, capsys):
    base, adapter, merged = folders(tmp_path, RIGHT["gpt-oss"])

    def turn(tensors):
        old = load_file(base / "model.safetensors")
        for key in tensors:
            if key.endswith("down_proj"):
                tensors[key] = old[key] + (tensors[key] - old[key]).mT

    change(merged, turn)
    assert status(base, adapter, merged) == 1
    (base / "config.json").unlink()
    assert status(base, adapter, merged) == 2
    assert "no config.json with a model_type" in capsys.readouterr().err


Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
WRONG = {
    "zeros": (lambda new, old: new[UP].zero_(), f"differs  {UP}"),
    "NaN": (lambda new, old: new[UP][0].fill_(torch.nan), f"differs  {UP}"),
    "NaN in an update": (lambda new, old: new[Q][0].fill_(torch.nan), "changed"),
    "missing": (lambda new, old: new.pop(UP), f"missing  {UP}"),
    "new": (lambda new, old: new.update(bias=torch.ones(2)), "new      bias"),
    "q's update also in k": (lambda new, old: new[K].add_(0.01), f"differs  {K}"),
    "factor 1.2": (lambda new, old: new[Q].add_(0.2 * (new[Q] - old[Q])), "scaled by 1.2"),
    "half": (lambda new, old: new[Q].sub_(0.5 * (new[Q] - old[Q])), "scaled by 0.5"),
    "half of the rows": (lambda new, old: new[Q][16:].copy_(old[Q][16:]), "changed"),
    "turned": (lambda new, old: new[Q].copy_(old[Q] + (new[Q] - old[Q]).T), "changed"),
    "left out": (lambda new, old: new[Q].copy_(old[Q]), "lost"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_is_named(name, tmp_path, capsys):
    base, adapter, merged = folders(tmp_path, RIGHT["llama"])
    edit, line = WRONG[name]
    change(merged, lambda tensors: edit(tensors, load_file(base / "model.safetensors")))
    assert status(base, adapter, merged) == 1
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(("precision", "std"), [("fp32", 0.001), ("fp32", 0.06), ("bf16", 0.001)])
def test_a_merge_into_int8_is_found(precision, std, tmp_path, capsys):
    """Rounding to int8 moves W by 0.5 %, which is more than bf16 does. At 0.06, the update is as
    large as W, so this is less than 1 % of the update.
    """
    base, adapter, merged = folders(tmp_path, RIGHT["llama"], precision, std)

    def quantise(tensors):
        step = tensors[Q].float().abs().amax(1, keepdim=True) / 127
        tensors[Q] = ((tensors[Q].float() / step).round() * step).to(tensors[Q].dtype)

    assert status(base, adapter, merged) == 0
    change(merged, quantise)
    assert status(base, adapter, merged) == 1
    assert f"changed                 {Q}" in capsys.readouterr().out


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=str)
def test_a_merge_in_bf16_may_be_stored_in_another_type(stored, tmp_path, capsys):
    """If the base is in fp32, W is rounded too, which is wrong."""
    for precision, expected in (("bf16", 0), ("fp32", 1)):
        base, adapter, merged = folders(tmp_path / precision, RIGHT["llama"], precision, 0.001)
        in_bf16 = {k: w.bfloat16() for k, w in load_file(merged / "model.safetensors").items()}
        tensors = {k: w.to(stored) for k, w in in_bf16.items()}
        save_file(tensors, merged / "model.safetensors", {"format": "pt"})
        assert main([str(base), str(adapter), str(merged)]) == expected, capsys.readouterr()


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_that_moves_away_from_its_embedding_is_found(tied, tmp_path, capsys):
    """BASE ties the head. MERGED stores it, and its config.json ties it or not."""
    base, adapter, merged = folders(tmp_path, RIGHT["qwen3, tied"])
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for head, expected in ((embedding, 0), (embedding + 0.01, 1)):
        change(merged, lambda tensors, head=head: tensors.update({"lm_head.weight": head.clone()}))
        assert status(base, adapter, merged) == expected
    assert "differs  lm_head.weight" in capsys.readouterr().out


def test_an_expert_that_is_left_out_is_found(tmp_path, capsys):
    base, adapter, merged = folders(tmp_path, RIGHT["qwen3-moe"], "bf16", 0.01)

    def leave_out(tensors):
        key = next(key for key in tensors if ".experts.3.down_proj" in key)
        tensors[key] = load_file(base / "model.safetensors")[key]

    change(merged, leave_out)
    assert status(base, adapter, merged) == 1
    assert "changed" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "rounded, keeps "), (1.2, "scaled by 1.2")])
def test_the_factor_decides_also_if_rounding_hides_a_part(factor, verdict, tmp_path, capsys):
    """In bf16, a step of W is about as large as the update."""
    base, adapter, merged = folders(tmp_path, RIGHT["llama"], "bf16", 0.0002)
    old = {k: w.float() for k, w in load_file(base / "model.safetensors").items()}
    parts = load_file(adapter / "adapter_model.safetensors")

    def merge(tensors):
        for key in parts:
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                b = parts[key.replace("lora_A", "lora_B")].float()
                update = 1.5 * factor * b @ parts[key].float()
                tensors[name] = (old[name] + update).bfloat16()

    change(merged, merge)
    assert status(base, adapter, merged) == int(factor != 1)
    assert verdict in capsys.readouterr().out
