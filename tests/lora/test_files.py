"""Check the content of adapter files, and the refusal of all other files."""

import json
import math
from shlex import split

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters.load import load_with_adapter, named_base
from common.files import file_sha256
from lora.inject import lora_layers
from lora.load import load_adapter, load_adapter_config
from lora.peft_config import CONFIG
from lora.save import BASE_SHA256, WEIGHTS, save_adapter
from storage.weights import load_gpt2
from tests.helpers import refusal, relative_difference, tiny_gpt2, tiny_gpt2_directory, token_ids
from tests.pairs import adapted
from tests.runs import contents

PREFIX = "base_model.model.transformer.h"
LAST = f"{PREFIX}.1.attn.c_attn.lora_B.weight"
ABSENT = object()


def change_weights(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file({key: x.contiguous().clone() for key, x in tensors.items()}, adapter / WEIGHTS)


def change_config(adapter, fields):
    config = json.loads((adapter / CONFIG).read_text()) | fields
    (adapter / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ABSENT}))


def refusal_of(adapter, file, base):
    """Return the reason why `file` is refused. The model must still compute the base's output."""
    model = load_gpt2(base)
    ids = token_ids(model.config.vocab_size, 1, 8)
    expected = model(ids)
    reason = refusal(adapter / file, load_adapter, model, adapter)
    assert torch.equal(model(ids), expected) and not lora_layers(model) and len(reason) < 200
    assert all(parameter.requires_grad for parameter in model.parameters())
    return reason


def test_the_files_are_pefts(base, tmp_path):
    model = adapted(base, ("c_proj", "c_fc"), r=2, lora_alpha=3, lora_dropout=0.25, use_rslora=True)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(load_gpt2(base), tmp_path)
    assert not any(tmp_path.iterdir())
    save_adapter(torch.compile(model.to(torch.bfloat16)), tmp_path, "owner/name", revision="v2")
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    stored = json.loads((tmp_path / CONFIG).read_text())
    assert stored == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/name",
        "revision": "v2",
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.25,
        "target_modules": ["c_proj", "c_fc"],
        "fan_in_fan_out": True,
        "bias": "none",
        "use_rslora": True,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
    assert stored.keys() <= peft.LoraConfig().to_dict().keys()
    assert load_adapter_config(tmp_path) == model.lora_config
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 12 and tensors[f"{PREFIX}.1.mlp.c_proj.lora_A.weight"].shape == (2, 128)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}  # bf16 in the model


def test_the_header_tells_another_base_and_peft_ignores_it(base, tmp_path):
    model = adapted(base)
    other, _ = tiny_gpt2_directory(tmp_path / "other", seed=1)  # with the same shapes
    adapter, sha256 = tmp_path / "adapter", file_sha256(base / "model.safetensors")
    save_adapter(model, adapter, str(base), sha256)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", BASE_SHA256: sha256}
    ids = token_ids(model.config.vocab_size, 1, 8)
    assert torch.equal(load_with_adapter(str(base), adapter).model(ids), model(ids))
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), adapter)
    assert relative_difference(model(ids), theirs(ids).logits) < 1e-6
    reason = refusal(adapter / WEIGHTS, load_with_adapter, str(other), adapter)
    assert reason.startswith("was trained on another base (weights sha256 ")
    save_adapter(model, adapter, str(base))  # no hash, as in PEFT's file: any base is accepted
    load_with_adapter(str(other), adapter)


def test_only_a_known_name_is_taken_for_the_base(adapter):
    names = {"mini": "mini", "./model/mini": "mini", "openai-community/gpt2-xl": "gpt2-xl"}
    for name, base in names.items():
        change_config(adapter, {"base_model_name_or_path": name})
        assert named_base(adapter) == base
    change_config(adapter, {"base_model_name_or_path": "other/gpt2"})
    assert named_base(adapter) == "other/gpt2"  # on the hub, as in PEFT
    for name in ("auto", "./gpt2", "../gpt2", "/other/gpt2", None, ["gpt2"]):
        change_config(adapter, {"base_model_name_or_path": name})
        assert "name its directory: --base DIR" in refusal(adapter, named_base)


# With any of these settings, a trained adapter computes the same.
IGNORED = split("""
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode
    loftq_config lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config
""")


def test_fields_that_do_not_change_the_result_are_ignored(adapter):
    expected = load_adapter_config(adapter)
    for field, *values in (
        *((field, None, 32, {"x": 1}) for field in IGNORED),
        ("init_lora_weights", False, "gaussian", "orthogonal", "eva", "mica"),
        ("task_type", None),
        ("fan_in_fan_out", False),
        ("rank_pattern", None),
        ("layers_to_transform", []),
        ("layers_pattern", None, [], ""),
        ("a_later_switch", False, None, [], {}),
    ):
        for value in values:
            change_config(adapter, {field: value})
            assert load_adapter_config(adapter) == expected, (field, value)


def test_a_file_without_a_dropout_has_pefts_default(adapter):
    change_config(adapter, {"lora_dropout": ABSENT})
    assert load_adapter_config(adapter).lora_dropout == peft.LoraConfig().lora_dropout


REFUSED = {
    "peft_type": [ABSENT, "IA3"],
    "task_type": ["SEQ_CLS"],
    "bias": ["all"],
    "r": [ABSENT, 0, 4.0, 2**62],
    "lora_alpha": [ABSENT, -1, "16", 1e300],
    "lora_dropout": [None, -0.1, 1.5],
    "fan_in_fan_out": ["true", None],
    "use_rslora": ["yes"],
    "target_modules": [ABSENT, [], ["c_attn", 3], ["c_attn.q"]],
    "use_dora": ["yes"],
    "layers_to_transform": [True, [0, "1"], {"x": 2}],
    "layers_pattern": [True, 1, [0], {"x": 2}],
    "rank_pattern": [["x"], {"x": 0}, {"x": 2.5}],
    "alpha_pattern": [{"x": "2"}, {"x": -1}],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new"],
    "a_later_switch": ["\n" * 999],
}
SWITCHES = peft.LoraConfig().to_dict().keys() - {*IGNORED, *REFUSED} | {"a_later_switch"}


def test_fields_that_would_change_the_result_are_refused_by_name(adapter):
    original = (adapter / CONFIG).read_text()
    for field in sorted(SWITCHES | REFUSED.keys()):
        on = [True, 1, "h", ["ln_f"], {"x": 2}] if field in SWITCHES else []
        for value in REFUSED.get(field, []) + on:
            (adapter / CONFIG).write_text(original)
            change_config(adapter, {field: value})
            reason = refusal(adapter / CONFIG, load_adapter_config, adapter)
            assert reason.startswith((f"{field} ", f"{field!r} ")), (field, value)
            assert len(reason) < 200


DAMAGED = [
    (lambda t: t.pop(LAST), f"tensor {LAST} is missing (1 in all)"),
    (lambda t: t.update({f"_orig_mod.{LAST}": t[LAST]}), f"unexpected tensor '_orig_mod.{LAST}'"),
    (lambda t: t.update({"x\ny" * 333: t[LAST]}), r"unexpected tensor 'x\nyx"),
    (lambda t: t.update({LAST: t[LAST].t()}), f"{LAST} has shape (4, 96), not (96, 4)"),
    (
        lambda t: t.update({LAST: t[LAST].long()}),
        f"{LAST} is not a tensor of fp32, fp16 or bf16 (torch.",
    ),
    (lambda t: t[LAST][2].fill_(-math.inf), f"{LAST} contains numbers that are not finite"),
]


def test_damaged_and_missing_files_are_refused_by_name(base, adapter):
    whole = (adapter / WEIGHTS).read_bytes()
    config = (adapter / CONFIG).read_bytes()
    for content in (b"", whole[:-1], b"<!DOCTYPE html>" * 99):
        (adapter / WEIGHTS).write_bytes(content)
        assert "damaged, or not a file of tensors" in refusal_of(adapter, WEIGHTS, base)
    (adapter / WEIGHTS).unlink()
    assert refusal_of(adapter, WEIGHTS, base) == "cannot be read (No such file or directory)"
    (adapter / WEIGHTS).write_bytes(whole)
    for content in (b"", b"[" * 500_000, b"\xff\xfe"):
        (adapter / CONFIG).write_bytes(content)
        assert "not valid JSON" in refusal_of(adapter, CONFIG, base)
    (adapter / CONFIG).write_bytes(b"[]")
    assert refusal_of(adapter, CONFIG, base) == "contains a JSON list, not an object"
    (adapter / CONFIG).unlink()
    assert f"contains no {CONFIG}; name an adapter" in refusal(adapter, load_adapter_config)
    (adapter / "config.json").write_bytes(config)
    assert "is a whole model, not an adapter" in refusal(adapter, load_adapter_config)


def test_a_lack_of_memory_is_not_blamed_on_the_file(base, adapter, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lora.load.checked", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(load_gpt2(base), adapter)


def test_equal_adapters_give_equal_bytes_and_a_failed_save_leaves_the_old_files(base, tmp_path):
    model = adapted(base)
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name, "gpt2", "a" * 64)
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "b") and before.keys() == {WEIGHTS, CONFIG}
    assert int.from_bytes(before[WEIGHTS][:8], "little") % 8 == 0  # tensors are aligned
    with torch.no_grad():
        model.h[1].attn.c_attn.lora_B.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"c_attn.lora_B.weight contains numbers that are not"):
        save_adapter(model, tmp_path / "a", "gpt2")
    assert contents(tmp_path / "a") == before


def test_what_does_not_fit_is_refused_and_the_model_left_alone(base, adapter, tmp_path):
    deeper, _ = tiny_gpt2_directory(tmp_path / "deeper", n_layer=3)
    reason = f"tensor {PREFIX}.2.attn.c_attn.lora_A.weight is missing"
    assert refusal_of(adapter, WEIGHTS, deeper).startswith(reason)
    weights = (adapter / WEIGHTS).read_bytes()
    for change, reason in DAMAGED:
        (adapter / WEIGHTS).write_bytes(weights)
        change_weights(adapter, change)
        assert refusal_of(adapter, WEIGHTS, base).startswith(reason)

    (adapter / WEIGHTS).write_bytes(weights)
    original = (adapter / CONFIG).read_text()
    for fields, reason in (
        ({"target_modules": ["c_attn", "wte"]}, "does not fit this model: target module 'w"),
        ({"target_modules": "c_("}, "target_modules 'c_(' is not a regular expression (missing )"),
        ({"rank_pattern": {"[": 2}}, "rank_pattern '[' is not a regular expression (untermin"),
        ({"x\ny" * 99: 1}, r"'x\nyx\ny"),
    ):
        (adapter / CONFIG).write_text(original)
        change_config(adapter, fields)
        assert refusal_of(adapter, CONFIG, base).startswith(reason)
