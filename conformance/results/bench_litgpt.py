"""LitGPT: pip install litgpt."""

import torch
from litgpt.lora import LoRALinear, LoRAQKVLinear, mark_only_lora_as_trainable


def wrap(linear, r, alpha, dropout, slices=(), widths=None):
    if linear.weight.dtype is not torch.float32:
        raise NotImplementedError("base and factors have the dtype that the caller chooses")
    fan_out, fan_in = linear.weight.shape
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": linear.bias is not None,
    }
    if slices:
        q, k, _ = widths or (fan_out // 3,) * 3
        head_size = k // 2
        layer = LoRAQKVLinear(
            fan_in,
            fan_out,
            head_size=head_size,
            n_head=q // head_size,
            n_query_groups=k // head_size,
            enable_lora=tuple(i in slices for i in range(3)),
            **settings,
        )
    else:
        layer = LoRALinear(fan_in, fan_out, **settings)
    layer.linear.load_state_dict(linear.state_dict())
    mark_only_lora_as_trainable(layer)
    return layer


def factors(layer):
    return layer.lora_A, layer.lora_B


def merge(layer):
    layer.merge()
