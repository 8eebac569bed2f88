"""Check targets and patterns against PEFT, in files of both sides."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.config import LoRAConfig
from lora.inject import inject, lora_layers
from lora.load import load_adapter
from lora.peft_config import CONFIG
from lora.save import WEIGHTS, adapter_state_dict, save_adapter
from storage.weights import load_gpt2
from tests.helpers import relative_difference, tiny_gpt2, tiny_gpt2_directory
from tests.pairs import IDS, adapted
from training.report import describe_parameters

PATTERNS = {
    "rank_pattern": {"c_attn": 2, r"h\.2\..*|1\.attn\.c_proj": 3, "transformer.h.0.mlp.c_proj": 5},
    "alpha_pattern": {r"[01].attn.c_(attn|proj)": 7, "c_proj": 2.5},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a base of three blocks, so that a range of blocks omits more than one."""
    return tiny_gpt2_directory(tmp_path_factory.mktemp("base"), n_layer=3)[0]


@pytest.mark.filterwarnings("error::UserWarning")  # including PEFT's warnings
@pytest.mark.parametrize(
    ("targets", "fields", "adapted_layers"),
    [
        ("all-linear", {}, 12),
        (("mlp.c_proj", "1.attn.c_attn", "transformer.h.0.mlp.c_fc"), {}, 5),
        (r"transformer\.h\.[02]\..*c_(attn|fc)", {}, 4),
        (("c_attn", "mlp.c_proj"), {"layers_to_transform": (1, 2)}, 4),
        (("c_attn",), {"layers_to_transform": 0}, 1),
        (("c_attn",), {"layers_to_transform": 1, "layers_pattern": "h"}, 1),
        # A whole name matches in every block.
        (("c_attn", "transformer.h.0.mlp.c_fc"), {"layers_to_transform": (1,)}, 2),
        (("c_attn", "c_proj"), PATTERNS, 9),
        (("c_attn", "c_proj"), PATTERNS | {"use_rslora": True, "layers_to_transform": (0, 2)}, 6),
    ],
)
def test_layers_ranks_scalings_counts_and_tensors_are_pefts(
    base, capsys, targets, fields, adapted_layers
):
    fields = {"r": 4, "lora_alpha": 6} | fields
    config = LoRAConfig(target_modules=targets, **fields)
    ours = load_gpt2(base)
    torch.manual_seed(3)
    inject(ours, config)
    torch.manual_seed(3)
    lists = json.loads(json.dumps({"target_modules": targets, **fields}))  # lists instead of tuples
    peft_config = peft.LoraConfig(**lists, fan_in_fan_out=True)
    theirs = peft.get_peft_model(tiny_gpt2(n_layer=3), peft_config)
    theirs.print_trainable_parameters()
    assert describe_parameters(ours) == capsys.readouterr().out.strip()
    names = [f"transformer.{name}" for name in lora_layers(ours)]
    assert names == theirs.base_model.targeted_module_names and len(names) == adapted_layers
    for name, layer in lora_layers(ours).items():
        their_layer = theirs.base_model.model.transformer.get_submodule(name)
        assert layer.scaling == their_layer.scaling["default"]
    # PEFT 0.17 would read the base's config on the hub, to compare vocabulary sizes.
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    tensors = adapter_state_dict(ours)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)


REFUSED = [
    ({"target_modules": r".*\.c_attn\.x"}, "by a full name; it has c_attn, c_fc, c_proj"),
    # A regular expression must match a whole name.
    ({"target_modules": "transformer.h.0.attn.c_a"}, "c_a' is not in the model"),
    ({"target_modules": r".*\.attn"}, "matches h.0.attn, a Attention; only linear layers"),
    ({"target_modules": ("lm_head",)}, "the head is tied to wte"),
    ({"target_modules": ("wpe",)}, "embedding"),
    ({"target_modules": ("c_attn", "q_proj")}, "'q_proj' is not in the model; it has c_attn, c_fc"),
    ({"target_modules": ("n.c_attn",)}, "'n.c_attn' is not in the model"),  # not after a dot
    ({"layers_to_transform": (1, 3)}, "layer 3 has no target module"),
    (
        {"target_modules": ("h.1.attn.c_attn",), "layers_to_transform": (2,)},
        r"only in layers 1 \.\. 1",
    ),
    ({"rank_pattern": {"attn": 2}}, "pattern 'attn' matches no adapted layer"),
    ({"target_modules": ("c_attn.q", "c_proj.v")}, "'c_proj.v': only c_attn has slices"),
    ({"target_modules": ("c_attn.q", "c_attn")}, "is named both whole and by a slice"),
    (
        {"target_modules": ("c_attn.q",), "init_lora_weights": "pissa"},
        "attn.c_attn: init_lora_weights='pissa' and slices in target_modules exclude each other",
    ),
    ({"rank_pattern": {"h.2.attn.c_attn": 17}, "init_lora_weights": "pissa"}, "outside 1 .. 16"),
]


def test_what_cannot_be_adapted_is_refused_and_the_model_left_alone(base):
    model = load_gpt2(base)
    before = dict(model.named_parameters())
    expected = model(IDS)
    for fields, reason in REFUSED:
        with pytest.raises(ValueError, match=reason):
            inject(model, LoRAConfig(**{"target_modules": ("c_attn",)} | fields))
            pytest.fail(f"{fields} is taken")
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
        assert all(p.requires_grad for p in after.values()) and not lora_layers(model)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize(("layers", "below"), [((2,), 2), ((1, 2), 1), (None, 0)])
def test_below_the_lowest_adapted_block_no_gradient_is_computed(base, layers, below):
    model = load_gpt2(base).train()
    inject(model, LoRAConfig(target_modules=("c_attn",), layers_to_transform=layers))
    needed = []
    for block in model.h:
        block.register_forward_hook(lambda block, x, y: needed.append(y.grad_fn is not None))
    model(IDS)
    assert needed == [i >= below for i in range(3)]


def test_an_adapter_of_pefts_first_versions_loads(base, tmp_path):
    """The config has `bias: lora_only`, and the file has no bias tensor."""
    model = adapted(base, ("c_attn",))
    save_adapter(model, tmp_path, "gpt2")
    stored = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(stored | {"bias": "lora_only"}))
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(n_layer=3), tmp_path)
    ours = load_gpt2(base)
    load_adapter(ours, tmp_path)
    assert torch.equal(ours(IDS), model(IDS))
    assert relative_difference(ours(IDS), theirs(IDS).logits) < 1e-6
    bias = "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"
    save_file(load_file(tmp_path / WEIGHTS) | {bias: torch.zeros(96)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: unexpected tensor '{bias}'"):
        load_adapter(load_gpt2(base), tmp_path)
