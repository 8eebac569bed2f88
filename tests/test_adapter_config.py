"""What is believed of an `adapter_config.json`: plain LoRA that fits the base, nothing else."""

import json
import time

import peft
import pytest
import torch

from lora.adapter import CONFIG, adapter_base, load_adapter
from model.checkpoint import load_gpt2
from tests.adapters import refusal_of
from tests.helpers import TINY, token_ids

IDS = token_ids(TINY["vocab_size"], 2, 16)


def change_config(adapter, **fields):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))


def test_every_field_of_pefts_default_config_is_taken(base, adapter):
    defaults = peft.LoraConfig(r=4, target_modules=["c_attn"]).to_dict()
    change_config(adapter, **defaults | {"target_modules": ["c_attn"]})
    assert load_adapter(load_gpt2(base), adapter).lora_alpha == defaults["lora_alpha"]


@pytest.mark.parametrize(("field", "value"), [
    ("inference_mode", False), ("revision", "main"), ("auto_mapping", {"base_model_class": "X"}),
    ("peft_version", "99"), ("base_model_name_or_path", "/etc"), ("task_type", None),
    ("fan_in_fan_out", False), ("modules_to_save", []), ("rank_pattern", None),
    ("layers_to_transform", []), ("init_lora_weights", False), ("init_lora_weights", "gaussian"),
    ("loftq_config", {"loftq_bits": 4}), ("qalora_group_size", 32), ("runtime_config", {"x": 1}),
    ("ensure_weight_tying", True), ("a_later_switch", False), ("a_later_config", None),
])
def test_fields_that_do_not_change_the_result_are_ignored(base, adapter, field, value):
    expected = load_gpt2(base)
    load_adapter(expected, adapter)
    change_config(adapter, **{field: value})
    model = load_gpt2(base)
    load_adapter(model, adapter)
    assert torch.equal(model(IDS), expected(IDS))


@pytest.mark.parametrize(("field", "value"), [
    ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["ln_f"]),
    ("rank_pattern", {"h.0.attn.c_attn": 2}), ("alpha_pattern", {"c_attn": 2}),
    ("layers_to_transform", [0]), ("layers_to_transform", 1), ("layers_pattern", "h"),
    ("exclude_modules", ["h.0.attn.c_attn"]), ("target_parameters", ["wte.weight"]),
    ("trainable_token_indices", [1]), ("layer_replication", [[0, 2]]), ("lora_bias", True),
    ("use_qalora", True), ("alora_invocation_tokens", [5]), ("arrow_config", {"top_k": 3}),
    ("use_bdlora", {"nblocks": 2}), ("velora_config", {"scale": 1.0}),
    ("kasa_config", {"beta": 0.1}), ("monteclora_config", {"num_samples": 8}),
    ("megatron_config", {"x": 1}), ("a_later_switch", True), ("a_later_config", {"x": 1}),
    *(("init_lora_weights", name) for name in
      ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard_of")),
    ("peft_type", "IA3"), ("peft_type", None), ("peft_type", ["LORA"]), ("task_type", "SEQ_CLS"),
    ("fan_in_fan_out", "true"), ("fan_in_fan_out", None), ("use_rslora", "yes"),
    *(("r", r) for r in (0, -1, 4.0, "4", True, None, [4], 2**62)),
    *(("lora_alpha", x) for x in (-1, "16", True, None, 1e300)),
    *(("lora_dropout", x) for x in (-0.1, 1.5, True, None, "0")),
    *(("target_modules", x) for x in (
        None, [], {}, "c_attn", ".*c_attn", "all-linear", ["c_attn", 3], [["c_attn"]],
        {"c_attn": 1})),
])
def test_fields_that_would_change_the_result_are_refused_by_name(base, adapter, field, value):
    change_config(adapter, **{field: value})
    refusal = refusal_of(adapter, CONFIG, base)
    assert refusal.startswith((f"{field} ", f"{field!r} "))


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_missing_field_is_refused_by_name(base, adapter, field):
    config = json.loads((adapter / CONFIG).read_text())
    del config[field]
    (adapter / CONFIG).write_text(json.dumps(config))
    assert refusal_of(adapter, CONFIG, base).startswith((f"{field} None", f"{field!r} None"))


@pytest.mark.parametrize(("fields", "reason"), [
    ({"r": 33}, "rank 33 is outside 1 .. 32"),
    ({"target_modules": ["c_attn", "q_proj"]}, "'q_proj' is not in the model"),
    ({"target_modules": ["wte"]}, "'wte' is refused: it is tied to the head"),
    ({"target_modules": ["lm_head"]}, "'lm_head' is refused: the head is tied"),
    ({"target_modules": ["attn"]}, "only linear layers"),
])
def test_a_config_that_does_not_fit_the_base_is_refused(base, adapter, fields, reason):
    change_config(adapter, **fields)
    refusal = refusal_of(adapter, CONFIG, base)
    assert refusal.startswith("does not fit this base: ") and reason in refusal


@pytest.mark.parametrize(("field", "value"), [
    ("x\ny" * 99, 1), ("x", "\n" * 999), ("x", json.loads("[" * 500 + "]" * 500)),
    ("x", list(range(9999))), ("r", "9" * 999), ("target_modules", "\x1b[2J" * 99),
    ("target_modules", ["\x1b[2J" * 99]),
])
def test_a_hostile_field_is_shown_short_and_in_one_line(base, adapter, field, value):
    change_config(adapter, **{field: value})
    refusal = refusal_of(adapter, CONFIG, base)
    assert refusal.isprintable() and len(refusal) < 200


def test_a_target_said_many_times_is_looked_for_once(base, adapter):
    change_config(adapter, target_modules=["c_attn"] * 50_000)
    began = time.process_time()
    assert load_adapter(load_gpt2(base), adapter).target_modules == ("c_attn",)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"r": 8}', b"[" * 10**5, b" " * (2 << 20), b"{}\0",
])
def test_a_config_that_is_none_is_refused(base, adapter, content):
    (adapter / CONFIG).write_bytes(content)
    refusal_of(adapter, CONFIG, base)


@pytest.mark.parametrize(("name", "base_name"), [
    *((name, name) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "mini")),
    ("openai-community/gpt2", "gpt2"), ("openai-community/gpt2-xl", "gpt2-xl"),
    *((name, None) for name in ("/tmp", "../gpt2", "auto", "", "other/gpt2", "gpt2/", None, 3,
                                ["gpt2"], "http://localhost/gpt2")),
])
def test_only_a_known_name_is_taken_for_the_base(adapter, name, base_name):
    change_config(adapter, base_model_name_or_path=name)
    assert adapter_base(adapter) == base_name
