"""Refiners: pip install refiners. It has a scale in place of alpha."""

import refiners.fluxion.layers as fl
import torch
from refiners.fluxion.adapters.lora import LinearLora, LoraAdapter


def wrap(linear, r, alpha, dropout):
    if linear.weight.dtype is not torch.float32:
        raise NotImplementedError("base and factors have the dtype that the caller chooses")
    if dropout:
        raise NotImplementedError("LinearLora has no dropout")
    fan_out, fan_in = linear.weight.shape
    base = fl.Linear(fan_in, fan_out, bias=linear.bias is not None)
    base.load_state_dict(linear.state_dict())
    base.requires_grad_(False)
    update = LinearLora("update", fan_in, fan_out, rank=r, scale=alpha / r)
    return LoraAdapter(base, update)


def factors(layer):
    return layer.loras["update"].down.weight, layer.loras["update"].up.weight
