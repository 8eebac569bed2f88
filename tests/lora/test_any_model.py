"""Models of transformers, and plain modules, against stock PEFT: from targets to files."""

import json
from copy import deepcopy

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from lora.config import LoRAConfig
from lora.inject import adapter_disabled, inject, lora_layers
from lora.layer import LoRALinear
from lora.load import load_adapter
from lora.merge import merge, unmerge, unwrap
from lora.peft_config import CONFIG
from lora.save import WEIGHTS, save_adapter
from tests.helpers import relative_difference, tiny_gpt2
from tests.models import (
    CASES,
    EXPERTS,
    GROUPED,
    Plain,
    assert_same,
    both,
    make,
    named,
    output,
    steps,
)
from tests.pairs import parameters, randomize

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # including PEFT's warnings
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
PAIRS = [("llama", variant) for variant in VARIANTS]
PAIRS += [("llama-tied", "plain"), ("qwen", "dora"), ("t5", "plain"), ("vit", "rslora")]
PAIRS += [("plain", "plain")]


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_training_files_and_merge_are_pefts(name, variant, tmp_path):
    """Every linear layer, from the seeded adapter over 5 steps to both files.

    Bit for bit, except DoRA's norm, because PEFT computes B A as B (A I), and rsLoRA, because its
    scaling is not a power of two. We scale A x, and PEFT scales B A x.
    """
    case = CASES[name]
    close = 1e-5 if variant in ("dora", "rslora") else 0.0
    ours, theirs = both(case, "all-linear", **VARIANTS[variant])
    assert list(lora_layers(ours)) == theirs.base_model.targeted_module_names
    base = output(make(case), case)
    assert relative_difference(output(ours, case), base) < 1e-5  # PiSSA rounds
    assert_same(parameters(ours), parameters(theirs.base_model.model))

    seen = steps(ours, case)
    assert_same(seen, steps(theirs, case), close)
    assert seen["loss 4"] < seen["loss 0"]
    assert_same(parameters(ours), parameters(theirs.base_model.model), close)
    trained = output(ours, case)
    evaluated = 1e-6 if variant == "pissa" else close  # our PiSSA evaluates with the saved adapter
    assert relative_difference(trained, output(theirs, case)) <= evaluated
    assert relative_difference(trained, base) > 0.01

    save_adapter(ours, tmp_path / "ours", "a-base")
    stored = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (stored["task_type"], stored["fan_in_fan_out"]) == (case.task_type, False)
    loaded = peft.PeftModel.from_pretrained(make(case), tmp_path / "ours").eval()
    assert relative_difference(output(loaded, case), trained) < 1e-5
    with loaded.disable_adapter():
        assert relative_difference(output(loaded, case), base) < 1e-5  # so the file has an effect

    if variant != "pissa":  # PEFT's PiSSA file needs another base, and is refused
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        again = make(case)
        load_adapter(again, tmp_path / "theirs")
        assert relative_difference(output(again, case), trained) <= close
        with adapter_disabled(again):
            assert relative_difference(output(again, case), base) < 1e-5
        first, second = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "theirs"))
        assert first.keys() == {key.replace(".weight.weight", ".weight") for key in second}

    before = {n: layer.base_layer.weight.clone() for n, layer in lora_layers(ours).items()}
    merge(ours)
    theirs.merge_adapter()
    for n, layer in lora_layers(ours).items():
        expected = theirs.base_model.model.get_submodule(n).base_layer.weight
        assert relative_difference(layer.base_layer.weight, expected) < 1e-6
    assert relative_difference(output(ours, case), trained) < 1e-4
    unmerge(ours)
    for n, layer in lora_layers(ours).items():
        assert relative_difference(layer.base_layer.weight, before[n]) < 1e-5
    merge(ours)
    unwrap(ours)
    assert relative_difference(output(ours, case), trained) < 1e-4
    assert not any(isinstance(module, LoRALinear) for module in ours.modules())


PATTERNS = {"rank_pattern": {"q_proj": 1, r"1\.mlp\..*": 3}, "alpha_pattern": {"up_proj": 7}}


def second_block(*pattern: str) -> dict:
    return {"layers_to_transform": [1], "layers_pattern": [*pattern]}


@pytest.mark.parametrize(
    ("name", "targets", "fields", "count"),
    [
        ("llama", r".*layers\.1\.(mlp|self_attn)\.[a-q]*_proj", {}, 3),
        ("qwen", ["k_proj", "up_proj"], second_block("(h|layers)"), 2),
        ("qwen", ["k_proj", "up_proj", "q_proj"], PATTERNS, 6),
        ("t5", ["q", "wi_0"], second_block("layer", "layers"), 4),
        ("t5", ["q"], second_block("(block|layer)"), 3),  # block.1, because block is first
        ("vit", ["attention.q_proj"], {"layers_to_transform": [1]}, 1),
        ("t5", ["q"], {"layers_to_transform": [1]}, 3),  # block.1, whatever the layer in it
    ],
)
def test_targets_are_pefts(name, targets, fields, count, tmp_path):
    case = CASES[name]
    if transformers.__version__ < "5" and name in ("vit", "t5"):
        pytest.skip("transformers 4 names ViT's layers, and orders T5's, in another way")
    ours, theirs = both(case, targets, **fields)
    names = list(lora_layers(ours))
    assert names == theirs.base_model.targeted_module_names and len(names) == count
    for layer in names:
        scaling = theirs.base_model.model.get_submodule(layer).scaling["default"]
        assert lora_layers(ours)[layer].scaling == scaling
    assert_same(parameters(ours), parameters(theirs.base_model.model))

    randomize(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    again = make(case)
    load_adapter(again, tmp_path)
    assert list(lora_layers(again)) == names
    assert relative_difference(output(again, case), output(theirs.eval(), case)) < 1e-6

    save_adapter(again, tmp_path / "again", "a-base")
    loaded = peft.PeftModel.from_pretrained(make(case), tmp_path / "again").eval()
    assert relative_difference(output(loaded, case), output(again, case)) < 1e-6


def test_pissa_of_some_blocks_is_written_by_full_names_which_peft_loads(tmp_path):
    case = CASES["qwen"]
    fields = {"init_lora_weights": "pissa", **second_block("layers")}
    ours, _ = both(case, ["q_proj", "up_proj"], **fields)
    randomize(ours)
    save_adapter(ours, tmp_path, "a-base")
    loaded = peft.PeftModel.from_pretrained(make(case), tmp_path).eval()
    assert relative_difference(output(loaded, case), output(ours, case)) < 1e-5
    assert relative_difference(output(loaded, case), output(make(case), case)) > 0.01


class Alike(nn.Module):
    """`lin` is the end of another name, and `b.lin` and `b_lin` differ in one character."""

    def __init__(self):
        super().__init__()
        self.b = nn.ModuleDict({"lin": nn.Linear(8, 8)})
        self.b_lin = nn.Linear(8, 8)
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        for name in ("b.lin", "b_lin", "lin"):
            x = torch.tanh(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize(("targets", "unusual"), [(r"b\.lin|b_lin|lin", r"b\.lin"), ("lin", "lin")])
def test_pissa_of_names_alike_is_written_for_these_layers_alone(targets, unusual, tmp_path):
    torch.manual_seed(0)
    base = Alike()
    patterns = {"rank_pattern": {f"^{unusual}": 3}, "alpha_pattern": {f"^{unusual}": 64}}
    fields = {"target_modules": targets, "init_lora_weights": "pissa", **patterns}
    model = inject(deepcopy(base), LoRAConfig(r=2, **fields)).eval()
    randomize(model)
    save_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    assert relative_difference(theirs(x), model(x)) < 1e-5
    load_adapter(base, tmp_path)
    assert lora_layers(base).keys() == lora_layers(model).keys()
    assert relative_difference(base(x), model(x)) < 1e-5


def test_pefts_adapter_of_a_head_is_read_only_on_the_same_head(tmp_path):
    """PEFT also stores the head's W. It may be in another precision, but not another W."""
    case = CASES["llama"]
    _, theirs = both(case, ["lm_head", "q_proj"])
    randomize(theirs)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        theirs.save_pretrained(tmp_path)
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(tmp_path / WEIGHTS)
    ours = make(case)
    load_adapter(ours, tmp_path)
    assert relative_difference(output(ours, case), output(theirs.eval(), case)) < 1e-6
    load_adapter(make(case).to(torch.bfloat16), tmp_path)

    other = make(case)
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=f"{copy} differs from the model's; use the adapter's bas"):
        load_adapter(other, tmp_path)
    assert not lora_layers(other)


class TiedPlain(Plain):
    """A plain module whose head shares its weight with an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 32)
        self.head.weight = self.embedding.weight


def test_a_layer_in_the_memory_of_another_parameter_is_tied():
    model = Plain()
    model.table = nn.Parameter(torch.randn(5, 64)[:, :32])  # not in a module
    model.row = nn.Parameter(model.table.data[1])  # ends before the table
    model.head.weight = nn.Parameter(model.table.data[4:])  # after `nbytes`: the rows have gaps
    before = model.table.clone()
    with pytest.raises(ValueError, match="head is tied to table, and an update of one would"):
        inject(model, LoRAConfig(r=1, target_modules=("head",)))
    inject(model, LoRAConfig(r=1, target_modules="all-linear"))
    left = ["enter", "blocks.0.q", "blocks.0.c_attn", "blocks.1.q", "blocks.1.c_attn"]
    assert list(lora_layers(model)) == left
    randomize(model)
    merge(model)
    assert torch.equal(model.table, before)


def test_layers_side_by_side_in_one_memory_are_not_tied():
    model = Plain()
    linear_layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    memory = torch.randn(sum(layer.weight.numel() for layer in linear_layers))
    parts = memory.split([layer.weight.numel() for layer in linear_layers])
    for layer, part in zip(linear_layers, parts, strict=True):
        layer.weight = nn.Parameter(part.view_as(layer.weight))
    inject(model, LoRAConfig(r=1, target_modules="all-linear"))
    assert len(lora_layers(model)) == 6


def test_a_weight_that_is_tied_after_inject_is_not_merged():
    model = inject(Plain(), LoRAConfig(r=1))
    randomize(model)
    model.table = model.head.base_layer.weight
    before = model.table.clone()
    with pytest.raises(ValueError, match=r"head\.base_layer is tied to table, and a merge would"):
        merge(model)
    assert torch.equal(model.table, before) and not model.enter.merged


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)


@pytest.mark.parametrize(
    ("build", "targets", "reason"),
    [
        (lambda: make(CASES["llama-tied"]), ("lm_head",), "lm_head is tied to model.embed_tokens"),
        (lambda: make(CASES["llama"]), ("embed_tokens",), "model.embed_tokens is an embedding"),
        (TiedPlain, ("head",), "head is tied to embedding, and an update of one would change"),
        (tiny_gpt2, "all-linear", "a Conv1D; only linear layers, nn.Linear, are adapted"),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 1)), "all-linear", "no linear layer, nn.Linear"),
        (encoder, ("linear1",), "TransformerEncoderLayer bypasses the forward of layers.0.linear1"),
        (encoder, ("out_proj",), "MultiheadAttention bypasses the forward of layers.0.self_attn"),
        (Plain, ("c_attn.q",), "'c_attn.q' is not in the model; it has c_attn, enter, head, q"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_one_line(build, targets, reason):
    model = build()
    with pytest.raises(ValueError, match=reason) as refused:
        inject(model, LoRAConfig(target_modules=targets))
    assert "\n" not in str(refused.value)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


NEEDS_FUSED_EXPERTS = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 has a linear layer for each expert"
)


@NEEDS_FUSED_EXPERTS
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # from PEFT
def test_experts_that_all_linear_leaves_out_are_named():
    ours = make(named("Mixtral", num_local_experts=4, **GROUPED))
    said = r"leaves out 74% of the model's weights.*: down_proj, gate_up_proj \("
    with pytest.warns(UserWarning, match=said) as warned:
        inject(ours, LoRAConfig(r=1, target_modules="all-linear"))
    assert len(warned) == 1 and len(lora_layers(ours)) == 8


@NEEDS_FUSED_EXPERTS
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_whose_layers_peft_takes_for_experts_is_not_written(tmp_path):
    case = named("Qwen3Moe", num_experts=4, mlp_only_layers=[0], **GROUPED, **EXPERTS)
    ours = make(case)
    with pytest.warns(UserWarning) as warned:
        inject(ours, LoRAConfig(r=2, target_modules="all-linear"))
    sentence = "save_adapter will refuse this adapter: PEFT would mistake model.layers.0.mlp."
    assert str(warned[-1].message).startswith(f"{sentence}gate_proj")
    with pytest.raises(ValueError, match="without gate, gate_proj, up_proj, down_proj"):
        save_adapter(ours, tmp_path / "refused", "a-base")
    assert not (tmp_path / "refused").exists()

    attention = make(case)
    inject(attention, LoRAConfig(r=2, target_modules=("o_proj",)))
    randomize(attention)
    save_adapter(attention, tmp_path, "a-base")
    loaded = peft.PeftModel.from_pretrained(make(case), tmp_path).eval()
    assert relative_difference(output(loaded, case), output(attention, case)) < 1e-6
    assert relative_difference(output(make(case), case), output(attention, case)) > 0.01
