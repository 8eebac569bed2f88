"""This project."""

from torch import nn

import lora
from lora import merge, unmerge  # noqa: F401  # for a model or a layer
from lora.quantised import quantise


def wrap(
    linear,
    r,
    alpha,
    dropout,
    use_rslora=False,
    use_dora=False,
    fan_in_fan_out=False,
    slices=(),
    nf4=False,
):
    linear.requires_grad_(False)
    if nf4:
        model = nn.Sequential(linear)
        quantise(model, "nf4")
        linear = model[0]
    if fan_in_fan_out:  # this project reads (in, out) weights into an nn.Linear
        stored = linear
        linear = nn.Linear(*stored.weight.shape).requires_grad_(False)
        linear.weight.data, linear.bias.data = stored.weight.data.T, stored.bias.data
    config = lora.LoRAConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, use_dora=use_dora
    )
    return lora.make_layer(linear, config, ["qkv"[i] for i in slices])


def factors(layer):
    return layer.lora_A.weight, layer.lora_B.weight


def inject(
    model,
    targets,
    r,
    alpha,
    layers=None,
    ranks=None,
    alphas=None,
    use_rslora=False,
    use_dora=False,
):
    config = lora.LoRAConfig(
        target_modules=tuple(targets),
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        layers_to_transform=layers,
        rank_pattern=ranks or {},
        alpha_pattern=alphas or {},
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    lora.inject(model, config)
    return model


def save(model, path):
    lora.save_adapter(model, path)


def load(model, path, **settings):
    lora.load_adapter(model, path)
    return model
