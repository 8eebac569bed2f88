"""`python -m adapters.export --plain`: logits in stock PEFT, and what the config leaves to read."""

import json

import peft
import pytest
import torch

from adapters.combine import main as combine
from adapters.export import main
from adapters.gguf import main as gguf
from adapters.quantisation import recorded_quantisation
from lora.files import WEIGHTS, base_hash, load_adapter, save_adapter
from lora.inject import inject
from lora.layer import LoRAConfig
from lora.peft_config import CONFIG
from lora.quantised import LAYERS
from storage.tensors import read_shapes
from storage.weights import load_gpt2
from tests.helpers import relative_difference
from tests.models import CASES, make, output
from tests.pairs import ALL_FOUR, IDS, adapted, randomize
from tests.runs import one_line, run, stdout_of, stock_model

ADAPTERS = {
    "rslora": (ALL_FOUR, {"r": 3, "lora_alpha": 5, "use_rslora": True}, 3, 8),
    "patterns": (
        ALL_FOUR,
        {"r": 3, "rank_pattern": {"h.0.attn.c_attn": 6}, "alpha_pattern": {"c_fc": 5}},
        6,
        8,
    ),
    "slices": (("c_attn.q", "c_attn.v", "c_fc"), {"r": 2, "lora_alpha": 3}, 4, 4),
    "pissa": (ALL_FOUR, {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"}, 4, 8),
    "one block": (ALL_FOUR, {"r": 2, "layers_to_transform": (1,)}, 2, 4),
}
# What a server reads that knows no variant: the rest of PEFT's fields must say nothing.
PLAIN = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}


def assert_plain(directory, rank, layers):
    stored = json.loads((directory / CONFIG).read_text())
    assert stored["r"] == stored["lora_alpha"] == rank
    assert PLAIN.items() <= stored.items()
    assert stored["layers_to_transform"] is None
    assert len(stored["target_modules"]) == layers
    shapes = read_shapes(directory / WEIGHTS)
    assert len(shapes) == 2 * layers
    assert {min(shape) for shape in shapes.values()} == {rank}


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_plain_form_computes_what_the_adapter_does_in_stock_peft(base, tmp_path, name):
    targets, config, rank, layers = ADAPTERS[name]
    save_adapter(*adapted(base, targets, **config), tmp_path / "lora", "gpt2", "a" * 64)
    out = tmp_path / "plain"
    said = stdout_of(main, "--plain", tmp_path / "lora", "--out", out)
    assert said.endswith(f"plain LoRA, r = lora_alpha = {rank}, {layers} layers\n")
    assert_plain(out, rank, layers)
    assert base_hash(out) == "a" * 64

    expected = stock_model(base, tmp_path / "lora")(IDS).logits
    assert relative_difference(stock_model(base, out)(IDS).logits, expected) < 1e-5
    ours = load_gpt2(base)
    load_adapter(ours, out)
    assert relative_difference(ours(IDS), expected) < 1e-5
    assert relative_difference(expected, stock_model(base)(IDS).logits) > 0.01


@torch.no_grad()
def test_an_adapter_of_another_model_needs_no_base(tmp_path):
    case = CASES["llama"]
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.*": 9}}
    config = peft.LoraConfig(
        r=2, target_modules=case.targets, task_type="CAUSAL_LM", use_rslora=True, **patterns
    )
    model = peft.get_peft_model(make(case), config)
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    stdout_of(main, tmp_path / "lora", "--out", tmp_path / "plain")
    assert_plain(tmp_path / "plain", 5, 4)
    plain = peft.PeftModel.from_pretrained(make(case), tmp_path / "plain").eval()
    assert relative_difference(output(plain, case), output(model.eval(), case)) < 1e-5


def test_what_the_base_was_quantised_to_stays_recorded_and_gguf_says_it(base, tmp_path):
    model = load_gpt2(base, quantise=LAYERS["nf4"])
    config = LoRAConfig(r=3)
    inject(model, config)
    randomize(model)
    save_adapter(model, config, tmp_path / "lora", "gpt2")
    stdout_of(main, tmp_path / "lora", "--out", tmp_path / "plain")
    assert recorded_quantisation(tmp_path / "plain") == "nf4"
    said = stdout_of(gguf, tmp_path / "lora", "--base", base, "--out", tmp_path / "lora.gguf")
    assert "trained on a base in nf4; write that with --base B --quantise nf4" in said


@pytest.mark.parametrize("command", [main, combine])
def test_the_revision_of_the_base_stays_recorded(base, tmp_path, command):
    save_adapter(*adapted(base, ("c_attn",), r=3), tmp_path / "lora", "owner/name@v2")
    stdout_of(command, tmp_path / "lora", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v2")


def test_dora_and_a_directory_that_exists_are_refused(base, adapter, tmp_path):
    save_adapter(*adapted(base, ("c_attn",), r=3, use_dora=True), tmp_path / "dora", "gpt2")
    line = one_line(run(main, tmp_path / "dora", "--out", tmp_path / "out"), 2)
    assert line.endswith("is DoRA, whose change is not B A alone; merge it instead")
    assert not (tmp_path / "out").exists()
    assert "exists already" in one_line(run(main, adapter, "--out", adapter), 2)
