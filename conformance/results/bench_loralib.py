"""loralib, https://github.com/microsoft/LoRA: pip install loralib."""

import loralib as lora
import torch


def wrap(linear, r, alpha, dropout, fan_in_fan_out=False, slices=()):
    if linear.weight.dtype is not torch.float32:
        raise NotImplementedError("base and factors have the dtype that the caller chooses")
    fan_out, fan_in = linear.weight.T.shape if fan_in_fan_out else linear.weight.shape
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": linear.bias is not None,
    }
    if slices:
        enabled = [i in slices for i in range(3)]
        layer = lora.MergedLinear(fan_in, fan_out, enable_lora=enabled, **settings)
    else:
        layer = lora.Linear(fan_in, fan_out, **settings)
    layer.load_state_dict(linear.state_dict(), strict=False)
    lora.mark_only_lora_as_trainable(layer)
    return layer


def factors(layer):
    return layer.lora_A, layer.lora_B


def merge(layer):
    layer.eval()


def unmerge(layer):
    layer.train()
