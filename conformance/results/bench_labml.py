"""labml-nn: pip install labml-nn."""

import torch
from labml_nn.lora import Linear


def wrap(linear, r, alpha, dropout):
    if linear.weight.dtype is not torch.float32:
        raise NotImplementedError("base and factors have the dtype that the caller chooses")
    if dropout:
        raise NotImplementedError("labml_nn.lora has no dropout")
    layer = Linear(linear.in_features, linear.out_features, linear.bias is not None, r, alpha)
    layer.load_state_dict(linear.state_dict(), strict=False)
    return layer


def factors(layer):
    return layer.lora_a, layer.lora_b
