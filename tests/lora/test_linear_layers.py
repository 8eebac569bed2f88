"""Layers that differ from `nn.Linear` are never adapted or merged with wrong results."""

from copy import deepcopy

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.falcon.modeling_falcon import FalconLinear

from lora import (
    LoRAConfig,
    dequantise,
    inject,
    load_adapter,
    lora_layers,
    merge,
    quantise,
    save_adapter,
    unwrap,
)
from lora.quantised import NF4Linear
from tests.helpers import relative_difference
from tests.pairs import randomize

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


class Twice(nn.Linear):
    """y = 2 W x + b, in a subclass of nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


class Attends(nn.Module):
    """An attention that reads the weight of its `out_proj`, a router, and a layer of Falcon."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.router = Router(64, 3)
        self.dense = FalconLinear(64, 64)

    def forward(self, x):
        x, _ = self.attention(x, x, x)
        return self.dense(x.flatten(0, -2)) + self.router(x.flatten(0, -2))[0][:, :1]


class Router(nn.Linear):
    def forward(self, x):
        return torch.topk(super().forward(x), 2, dim=1)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_all_linear_leaves_out_what_cannot_be_adapted_and_merges_what_computes_wx(fields, tmp_path):
    torch.manual_seed(0)
    base = Attends().eval()
    model = deepcopy(base)
    with pytest.warns(UserWarning, match=r"of attention\.out_proj; the forward of router, a Rout"):
        inject(model, LoRAConfig(target_modules="all-linear", **fields))
    assert list(lora_layers(model)) == ["dense"]
    randomize(model)
    adapted = model(X[None])
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    assert relative_difference(theirs(X[None]), adapted) < 1e-5
    merge(model)
    assert relative_difference(model(X[None]), adapted) < 1e-5
    for name, reason in {"out_proj": "bypasses the forward", "router": "does not return"}.items():
        with pytest.raises(ValueError, match=reason):
            inject(deepcopy(base), LoRAConfig(target_modules=[name]))


def eight_bits(*shape):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False).to("cpu")


def replaced(*shape):
    """Return a layer whose object has another forward than its class."""
    layer = nn.Linear(*shape)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


@pytest.mark.parametrize("kind", [Twice, replaced, eight_bits])
def test_a_layer_with_its_own_forward_takes_plain_lora_and_nothing_that_changes_its_weight(kind):
    model = nn.Sequential(nn.Linear(64, 64), kind(64, 32)).eval()
    base = model(X)
    for fields in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match=r"^1: .* overrides forward, which may compute"):
            inject(model, LoRAConfig(target_modules="all-linear", **fields))
    with pytest.raises(ValueError, match=r"^1: .* overrides forward"):
        quantise(model, "int8")
    assert type(model[0]) is nn.Linear and torch.equal(model(X), base)

    inject(model, LoRAConfig(target_modules="all-linear"))
    assert torch.equal(model(X), base)
    randomize(model)
    adapted = model(X)
    assert relative_difference(adapted, base) > 0.1
    with pytest.raises(ValueError, match=r"^1: .* overrides forward"):
        merge(model)
    assert not lora_layers(model)["0"].merged and torch.equal(model(X), adapted)


def double(layer, x, *y):
    """A hook. Without y, it is called before the layer's forward."""
    return 2 * (y or x)[0]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_a_hook_takes_plain_lora_and_is_not_merged_or_replaced(register):
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    hook = getattr(model[0], register)(double)
    base = model(X)
    for fields in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match=r"^0: Linear has a forward hook, which may"):
            inject(model, LoRAConfig(**fields))
    with pytest.raises(ValueError, match=r"^0: Linear has a forward hook"):
        quantise(model, "int8")
    assert torch.equal(model(X), base)
    randomize(inject(model, LoRAConfig()))
    adapted = model(X)
    with pytest.raises(ValueError, match=r"^0: Linear has a forward hook"):
        merge(model)
    assert torch.equal(model(X), adapted)

    hook.remove()
    merge(model)
    getattr(model[0], register)(double)
    with pytest.raises(ValueError, match=r"^0: LoRALinear has a forward hook"):
        unwrap(model)
    model = nn.Sequential(nn.Linear(64, 32))
    quantise(model, "nf4")
    getattr(model[0], register)(double)
    with pytest.raises(ValueError, match=r"^0: NF4Linear has a hook, which would be lost"):
        dequantise(model)


def test_without_the_weights_numbers_nothing_is_merged_saved_or_loaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def model():
        return nn.Sequential(nn.Linear(64, 32, bias=False)).eval()

    adapted = inject(model(), LoRAConfig())
    save_adapter(adapted, tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match="is on the meta device; load its"):
        load_adapter(model(), tmp_path)
    randomize(adapted)
    accelerate.cpu_offload(adapted, execution_device="cpu")
    before = adapted(X)
    with pytest.raises(ValueError, match=r"^0: the weight is on the meta device, or offloaded"):
        merge(adapted)
    with pytest.raises(ValueError, match=r"^the adapter is on the meta device, or offloaded"):
        save_adapter(adapted, tmp_path)
    assert torch.equal(adapted(X), before)
    with pytest.raises(ValueError, match="accelerate has offloaded 0; adapt the model before"):
        inject(accelerate.cpu_offload(model(), execution_device="cpu"), LoRAConfig())


def test_a_layer_that_accelerate_places_on_a_device_is_merged():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.AlignDevicesHook("cpu"))
    assert "forward" in vars(model[0])
    inject(model, LoRAConfig(target_modules="all-linear"))
    randomize(model)
    adapted = model(X)
    merge(model)
    assert relative_difference(model(X), adapted) < 1e-5


@pytest.mark.parametrize("row", [0, 1e-30, 1e30, float("nan")])
def test_dora_refuses_a_row_whose_norm_is_not_a_positive_number(row):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    with torch.no_grad():
        model[1].weight[3] = row
    with pytest.raises(
        ValueError, match=r"^1: row 3 of the weight has the norm (0|inf|nan) in fp3"
    ):
        inject(model, LoRAConfig(target_modules="all-linear", use_dora=True))
    assert not lora_layers(model)
    with torch.no_grad():
        model[1].weight[3] = 1e-15
    inject(model.eval(), LoRAConfig(target_modules="all-linear", use_dora=True))
    assert model(X).isfinite().all()


def test_a_parametrized_weight_takes_lora_and_is_not_merged():
    model = nn.Sequential(weight_norm(nn.Linear(64, 32))).eval()
    base = model(X)
    inject(model, LoRAConfig(target_modules="all-linear"))
    assert torch.equal(model(X), base)
    randomize(model)
    adapted = model(X)
    with pytest.raises(ValueError, match=r"^0: the weight is computed from other .*weight_norm"):
        merge(model)
    assert torch.equal(model(X), adapted)


def test_quantise_replaces_all_but_the_head_or_what_is_named():
    class Model(nn.Sequential):
        def get_output_embeddings(self):
            return self[2]

    def kinds(*arguments, build=Model):
        model = build(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5))
        quantise(model, *arguments)
        return [type(layer) for layer in model]

    assert kinds("nf4") == [NF4Linear, NF4Linear, nn.Linear]
    assert kinds("nf4", ("1",)) == [nn.Linear, NF4Linear, nn.Linear]
    assert kinds("nf4", build=nn.Sequential) == [NF4Linear] * 3  # no layer is known as the head
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantise(model, "nf4", ("1",))
    with pytest.raises(ValueError, match="1: is quantised already, in nf4; `dequantise` first"):
        quantise(model, "int8")
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="'fp4' is not one of nf4, int8"):
        kinds("fp4")
