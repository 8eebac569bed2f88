"""torchtune: pip install torchtune torchao."""

import torch
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params


def wrap(linear, r, alpha, dropout, use_dora=False):
    if linear.weight.dtype is not torch.float32:
        raise NotImplementedError("base and factors have the dtype that the caller chooses")
    fan_out, fan_in = linear.weight.shape
    if use_dora and linear.bias is not None:
        raise NotImplementedError("DoRALinear has no bias")
    if use_dora:
        layer = DoRALinear(fan_in, fan_out, r, alpha, dropout)
    else:
        layer = LoRALinear(fan_in, fan_out, r, alpha, dropout, use_bias=linear.bias is not None)
    layer.load_state_dict(linear.state_dict(), strict=False)
    set_trainable_params(layer, get_adapter_params(layer))
    return layer


def factors(layer):
    return layer.lora_a.weight, layer.lora_b.weight
